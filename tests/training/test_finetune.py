"""finetune: the error falls, runs resume, and mistakes are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.reference import assert_untouched, relative_error, snapshot
from tests.test_calibration import images, net
from wsp_compiler.errors import InputError, OptionError
from wsp_compiler.training.finetune import finetune, learning_rate_at
from wsp_compiler.training.prune import prune


def test_distillation_mends_the_network() -> None:
    dense, test = net(), images(8)
    before = snapshot(dense)
    pruned = prune(dense, 0.5, calibration=images())
    start = relative_error(pruned(test), dense(test))
    seen: list[float] = []
    finetune(
        pruned,
        (images(8) for _ in range(1000)),
        teacher=dense,
        steps=80,
        learning_rate=2e-3,
        on_step=lambda step, loss, fraction: seen.append(float(loss)),
    )
    assert len(seen) == 80
    assert relative_error(pruned(test), dense(test)) < 0.95 * start
    assert not pruned.training
    assert_untouched(dense, before)


def test_cross_entropy_on_labels() -> None:
    model = nn.Sequential(net(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    pruned = prune(model, 0.5)
    x, labels = images(16), torch.arange(16) % 20
    before = nn.functional.cross_entropy(pruned(x), labels)
    finetune(pruned, [(x, labels)], steps=30, learning_rate=2e-3, train_norms=True)
    assert nn.functional.cross_entropy(pruned(x), labels) < 0.8 * before


def test_batch_norm_statistics_are_kept_unless_asked() -> None:
    for train_norms in (False, True):
        pruned = prune(net(), 0.5)
        statistics = pruned.get_submodule("a_norm").running_mean.clone()  # type: ignore[union-attr, operator]
        finetune(pruned, [images(4)], teacher=net(), steps=2, train_norms=train_norms)
        same = torch.equal(pruned.get_submodule("a_norm").running_mean, statistics)  # type: ignore[arg-type]
        assert same != train_norms


class Stop(Exception):  # noqa: N818
    pass


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    dense, batch = net(), images(4)
    whole = prune(dense, 0.5)
    finetune(whole, [batch], teacher=dense, steps=10)
    cut = prune(dense, 0.5)
    options: dict[str, Any] = {"teacher": dense, "steps": 10, "checkpoint": tmp_path / "run.pt"}

    def stop(step: int, loss: Tensor, fraction: float) -> None:
        if step == 6:
            raise Stop

    with pytest.raises(Stop):
        finetune(cut, [batch], checkpoint_seconds=0.0, on_step=stop, **options)
    resumed = prune(dense, 0.5)
    steps: list[int] = []
    finetune(resumed, [batch], on_step=lambda step, loss, fraction: steps.append(step), **options)
    assert steps == [6, 7, 8, 9, 10]
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    done: list[int] = []
    finetune(resumed, [batch], on_step=lambda step, loss, fraction: done.append(step), **options)
    assert not done


def test_seconds_end_a_run() -> None:
    fractions: list[float] = []
    finetune(
        prune(net(), 0.5), [images(2)], teacher=net(), seconds=0.5,
        on_step=lambda step, loss, fraction: fractions.append(fraction),
    )  # fmt: skip
    assert fractions
    assert fractions == sorted(fractions)
    assert fractions[-1] < 1


def test_learning_rate() -> None:
    assert learning_rate_at(0.0, 1.0) < 0.1
    assert learning_rate_at(0.02, 1.0) == pytest.approx(1.0)
    assert learning_rate_at(1.0, 1.0) == pytest.approx(0.0)


def bad_loss(output: Tensor, target: Tensor) -> Tensor:
    return output.sum() * float("nan")


def test_mistakes() -> None:
    model = prune(net(), 0.5)
    with pytest.raises(OptionError, match="either steps or seconds"):
        finetune(model, [images(2)], teacher=net())
    with pytest.raises(OptionError, match="either steps or seconds"):
        finetune(model, [images(2)], teacher=net(), steps=1, seconds=1.0)
    with pytest.raises(InputError, match="holds no batch"):
        finetune(model, [], teacher=net(), steps=1)
    with pytest.raises(InputError, match="holds no labels"):
        finetune(model, [images(2)], steps=1)
    with pytest.raises(InputError, match="the loss is nan at step 1"):
        finetune(model, [images(2)], teacher=net(), loss=bad_loss, steps=1)
    assert not model.training
