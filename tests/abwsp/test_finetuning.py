"""Fine-tuning of winners: functions and settings, shards, and checkpoints that go on exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.abwsp.problem import PR, labelled, net
from wsp_compiler.abwsp.finetuning import Shard, check_finetune, run_finetune
from wsp_compiler.abwsp.ranks import Ranks
from wsp_compiler.abwsp.seeds import seeded
from wsp_compiler.errors import OptionError
from wsp_compiler.training.prune import prune

ALONE = Ranks()


def pruned() -> nn.Module:
    return prune(net(), PR, method="wsp")


def flat(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def test_nothing_is_done_without_finetune() -> None:
    module = pruned()
    before = flat(module)
    assert run_finetune(None, module, ALONE, None) is module
    assert torch.equal(flat(module), before)


@pytest.mark.parametrize("returns", [True, False])
def test_a_function_trains_in_place_or_returns(returns: bool) -> None:
    module = pruned()

    def step(given: nn.Module) -> nn.Module | None:
        assert given is module
        with torch.no_grad():
            for parameter in given.train().parameters():
                parameter.mul_(2)
        return given if returns else None

    before = flat(module)
    assert run_finetune(step, module, ALONE, None) is module
    assert torch.equal(flat(module), 2 * before)
    assert not module.training


@pytest.mark.parametrize("wrong", [nn.Linear(1, 1), 3, "model"])
def test_what_a_function_returns_is_checked(wrong: Any) -> None:
    with pytest.raises(OptionError, match="that is not the module it got"):
        run_finetune(lambda module: wrong, pruned(), ALONE, None)


def test_settings_run_the_packages_loop() -> None:
    module = pruned()
    before = flat(module)
    steps: list[int] = []
    run_finetune(
        {"data": labelled(), "steps": 3, "on_step": lambda step, loss, fraction: steps.append(step)},
        module, ALONE, None,
    )  # fmt: skip
    assert steps == [1, 2, 3]
    assert not torch.equal(flat(module), before)


class Cut(Exception):  # noqa: N818
    pass


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    """Shuffled data go on where they were, over the end of an epoch."""
    pairs = [pair for x, y in labelled() for pair in zip(x, y, strict=True)]
    loader = DataLoader(pairs, batch_size=16, shuffle=True)  # type: ignore[arg-type, var-annotated]

    def train(module: nn.Module, checkpoint: Path | None, stop: int | None = None) -> Tensor:
        def on_step(step: int, loss: Tensor, fraction: float) -> None:
            if step == stop:
                raise Cut

        settings = {"data": loader, "steps": 10, "checkpoint_seconds": 0.0, "on_step": on_step}
        with seeded(3, "training"):
            return flat(run_finetune(settings, module, ALONE, checkpoint))

    wanted = train(pruned(), None)
    file = tmp_path / "run.pt"
    for stop in (2, 7):
        with pytest.raises(Cut):
            train(pruned(), file, stop)
        torch.rand(3)  # another process would not have come here with the same generator
    assert torch.equal(train(pruned(), file), wanted)


def test_shards_are_disjoint_and_complete() -> None:
    data = list(range(10))
    parts = [list(Shard(data, Ranks(rank, 3))) for rank in range(3)]
    assert parts == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
    shard = Shard(data, Ranks(1, 3), skip=4)
    assert list(shard) == [4, 7]  # three of the first epoch and one of the second are done
    assert list(shard) == [1, 4, 7]
    assert list(Shard(data, ALONE, skip=10)) == []
    assert list(Shard([], ALONE, skip=1)) == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "finetune is a int"),
        (nn.Identity(), "finetune is a Identity"),
        ({"steps": 3}, "has no data"),
        ({"data": 3, "steps": 3}, "data of type int"),
        ({"data": iter([1]), "steps": 3}, "data of type list_iterator"),
        ({"data": [1], "epochs": 3}, "has the settings epochs"),
        ({"data": [1], "checkpoint": "x"}, "has the settings checkpoint"),
    ],
)
def test_mistakes(value: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        check_finetune(value)


def test_several_ranks_need_steps() -> None:
    settings = {"data": labelled(1), "seconds": 1.0}
    check_finetune(settings)

    class Two(Ranks):
        def wrapped(self, module: nn.Module) -> nn.Module:
            return module

    with pytest.raises(OptionError, match="every rank would stop at another step"):
        run_finetune(settings, pruned(), Two(0, 2), None)
