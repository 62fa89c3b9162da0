"""Fine-tuning of a round's winner: by the user's function or by the package's loop, data-parallel on several ranks."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from wsp_compiler.abwsp.ranks import Ranks
from wsp_compiler.errors import OptionError
from wsp_compiler.training.finetune import finetune as package_finetune

Finetune = Callable[[nn.Module], Any] | Mapping[str, Any] | None
"""A function that trains a module (in place, or returns it), settings of :func:`wsp_compiler.finetune`, or nothing."""


def check_finetune(value: Any) -> None:
    """Raise :class:`OptionError` unless ``value`` is a :data:`Finetune` that can be used in every round."""
    if value is None or (callable(value) and not isinstance(value, (Mapping, nn.Module))):
        return
    fix = "give a function that trains the module it gets, settings such as {'data': loader, 'steps': 1000}, or None"
    if not isinstance(value, Mapping):
        kind = type(value).__name__
        raise OptionError(f"finetune is a {kind}", where="search", fix=fix)
    settings = cast("Mapping[str, Any]", value)
    known = [
        name for name in inspect.signature(package_finetune).parameters if name not in ("model", "checkpoint")
    ]
    unknown = [str(name) for name in settings if name not in known]
    if unknown:
        raise OptionError(
            f"finetune has the settings {', '.join(unknown)}",
            where="search",
            fix=f"use those of wsp_compiler.finetune: {', '.join(known)}; checkpoints follow from state=",
        )
    data = settings.get("data")
    if not isinstance(data, Iterable) or isinstance(data, Iterator):
        found = "no data" if data is None else f"data of type {type(cast('object', data)).__name__}"
        raise OptionError(
            f"finetune has {found}",
            where="search",
            fix="give data that every round can read from the beginning, such as a DataLoader or a list of batches",
        )


class Shard:
    """One rank's batches, each ``size``-th, without the first ``skip``, which an interrupted run has used."""

    def __init__(self, data: Iterable[Any], ranks: Ranks, skip: int = 0) -> None:
        self._data, self._ranks, self._skip = data, ranks, skip

    def __iter__(self) -> Iterator[Any]:
        while True:
            own = 0
            for index, batch in enumerate(self._data):
                if index % self._ranks.size != self._ranks.rank:
                    continue
                own += 1
                if self._skip:
                    self._skip -= 1
                else:
                    yield batch
            if not self._skip or not own:
                return


def run_finetune(finetune: Finetune, module: nn.Module, ranks: Ranks, checkpoint: Path | None) -> nn.Module:
    """Train ``module``, which is the same on all ranks before and after.

    Args:
        finetune: see :data:`Finetune`. A function gets a DistributedDataParallel if there are several ranks, and has
            to give each its own data (DistributedSampler).
        module: of :func:`wsp_compiler.prune`.
        checkpoint: where the package's loop keeps its state on rank 0; a run that finds one goes on from there.

    Raises:
        OptionError: what the function returns is not the module that it got.
    """
    if finetune is None:
        return module
    wrapped = ranks.wrapped(module)
    if isinstance(finetune, Mapping):
        _run_package_loop(wrapped, cast("Mapping[str, Any]", finetune), ranks, checkpoint)
    else:
        returned = finetune(wrapped)
        trained = wrapped if returned is None else returned
        if isinstance(trained, DistributedDataParallel):
            trained = cast("Any", trained).module
        if not isinstance(trained, nn.Module) or _layout(trained) != _layout(module):
            raise OptionError(
                f"finetune returned a {type(cast('object', trained)).__name__} that is not the module it got",
                where="search",
                fix="train the module in place, and return it or None",
            )
        module = trained
    ranks.synchronise(module)
    return module.eval()


def _layout(module: nn.Module) -> dict[str, torch.Size]:
    state: dict[str, torch.Tensor] = module.state_dict()
    return {name: tensor.shape for name, tensor in state.items()}


def _run_package_loop(
    module: nn.Module, settings: Mapping[str, Any], ranks: Ranks, checkpoint: Path | None
) -> None:
    if ranks.size > 1 and settings.get("seconds") is not None:
        raise OptionError(
            "finetune has seconds, after which every rank would stop at another step",
            where="search",
            fix="give steps",
        )
    options = {name: value for name, value in settings.items() if name != "data"}
    with tempfile.TemporaryDirectory() as folder:
        if checkpoint is not None:
            # every rank continues from rank 0's state; only rank 0's file outlives the run
            held = ranks.first(lambda: _contents(checkpoint))
            if ranks.rank:
                checkpoint = Path(folder) / checkpoint.name
                options["checkpoint_seconds"] = float("inf")
                if held is not None:
                    checkpoint.write_bytes(held)
        data = Shard(settings["data"], ranks, _steps_done(checkpoint))
        package_finetune(module, data, checkpoint=checkpoint, **options)


def _contents(file: Path | None) -> bytes | None:
    return file.read_bytes() if file is not None and file.is_file() else None


def _steps_done(checkpoint: Path | None) -> int:
    if checkpoint is None or not checkpoint.is_file():
        return 0
    state: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    return int(state["step"])
