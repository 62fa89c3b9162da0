"""The processes of a search: one, or those that torchrun has started.

Work that differs by rank ends in an exchange of small objects over a gloo group of its own, whatever the default group
is made for. What raises on one rank raises on all of them: nobody waits for a process that is gone.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
from collections.abc import Callable, Generator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed as torch_distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from wsp_compiler.errors import ModelError, SearchError

T = TypeVar("T")
PATIENCE = timedelta(days=7)
"""How long a rank waits for the others: they may be fine-tuning or evaluating."""

dist: Any = torch_distributed


@dataclass(frozen=True)
class Ranks:
    """This process among those of the search; without ``group`` it is alone."""

    rank: int = 0
    size: int = 1
    group: Any = None

    def all(self, work: Callable[[], T]) -> list[T]:
        """What ``work()`` returns on every rank, by rank; called by all ranks. Values are pickled.

        Raises:
            Exception: what ``work`` raises here. SearchError: it has failed on another rank.
        """
        if self.size == 1:
            return [work()]
        own, error = _outcome(work)
        answers: list[Any] = [None] * self.size
        dist.all_gather_object(answers, own, group=self.group)
        if error is not None:
            raise error
        return [_value(rank, answer) for rank, answer in enumerate(answers)]

    def first(self, work: Callable[[], T]) -> T:
        """What ``work()`` returns on rank 0, which alone calls it; called by all ranks. Raises as :meth:`all`."""
        if self.size == 1:
            return work()
        own, error = _outcome(work) if self.rank == 0 else (None, None)
        answer = [own]
        dist.broadcast_object_list(answer, src=0, group=self.group)
        if error is not None:
            raise error
        return _value(0, answer[0])

    def wrapped(self, module: nn.Module) -> nn.Module:
        """``module`` for training: data-parallel if there are several ranks."""
        if self.size == 1:
            return module
        device = next(module.parameters()).device
        return DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None)

    def synchronise(self, module: nn.Module) -> None:
        """Give every rank rank 0's parameters and buffers, bitwise."""
        if self.size == 1:
            return
        state: dict[str, torch.Tensor] = module.state_dict()
        sent = self.first(lambda: {name: tensor.cpu() for name, tensor in state.items()})
        with torch.no_grad():
            for name, tensor in state.items():
                tensor.copy_(sent[name])


def _outcome(work: Callable[[], Any]) -> tuple[tuple[Any, str | None], Exception | None]:
    """((value, what failed or None), the error or None)."""
    try:
        return (work(), None), None
    except Exception as error:  # the other ranks have to learn of whatever it is
        return (None, f"{type(error).__name__}: {error}"), error


def _value(rank: int, answer: Any) -> Any:
    value, failed = answer
    if failed is not None:
        raise SearchError(f"it failed with {failed}", where=f"rank {rank}", fix="see that rank's message")
    return value


@contextlib.contextmanager
def join(device: torch.device) -> Generator[Ranks]:
    """The ranks of this run: of the process group if there is one, or of the one that torchrun asks for.

    A group that is made here (NCCL where the model is on CUDA, else gloo) is left to what follows, such as another
    search, and taken down at exit: a second one cannot be made in the same run.

    Raises:
        ModelError: two processes have their models on the same GPU.
    """
    launched = dist.is_available() and int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
    if launched and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(_leave)
    group: Any = None
    try:
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            yield Ranks()
            return
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
        ranks = Ranks(dist.get_rank(), dist.get_world_size(), group)
        _check_devices(ranks, device)
        yield ranks
    finally:
        if group is not None:
            dist.destroy_process_group(group)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _check_devices(ranks: Ranks, device: torch.device) -> None:
    places = ranks.all(lambda: (socket.gethostname(), str(device)))
    if device.type == "cuda" and len(set(places)) < len(places):
        listed = ", ".join(f"rank {rank}: {place[1]}" for rank, place in enumerate(places))
        raise ModelError(
            f"several processes have it on one GPU ({listed})",
            where="model",
            fix="move it to torch.device('cuda', int(os.environ['LOCAL_RANK'])) before the search",
        )
