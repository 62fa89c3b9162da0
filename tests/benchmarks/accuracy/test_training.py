"""The training loop learns, follows its schedule, and goes on where it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.accuracy.outlook import accuracy
from benchmarks.accuracy.tasks import Task
from benchmarks.accuracy.training import Recipe, train


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2)
    )


def test_it_learns(task: Task) -> None:
    losses: list[float] = []
    model = train(
        small(), task.train, Recipe(30, 8, 1e-2), on_step=lambda step, loss: losses.append(float(loss))
    )
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert accuracy(model, task.test) > 0.9
    assert not model.training


def test_the_rate_rises_and_falls() -> None:
    recipe = Recipe(100, learning_rate=1.0)
    rates = [recipe.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == pytest.approx(rates[4], rel=1e-2)
    assert rates[-1] == pytest.approx(0.0, abs=1e-3)
    assert rates[5:] == sorted(rates[5:], reverse=True)


def test_a_killed_run_goes_on(task: Task, tmp_path: Path) -> None:
    path = tmp_path / "run.checkpoint"
    steps: list[int] = []

    def stop(step: int, loss: Tensor) -> None:
        steps.append(step)
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(small(), task.train, Recipe(6, 4), checkpoint=path, checkpoint_seconds=0.0, on_step=stop)
    assert path.is_file()
    moments = torch.load(path, weights_only=True)["optimizer"]["state"][0]
    assert float(moments["step"]) == 3
    train(small(), task.train, Recipe(6, 4), checkpoint=path, on_step=lambda step, loss: steps.append(step))
    assert steps == [1, 2, 3, 4, 4, 5, 6]
    assert not path.is_file()


def test_a_loss_that_is_not_finite_is_an_error(task: Task) -> None:
    model = small()
    with torch.no_grad():
        model[4].weight[0, 0] = float("nan")
    with pytest.raises(ArithmeticError, match="loss is nan"):
        train(model, task.train, Recipe(2, 4))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_graph_trains_as_eager_does(task: Task) -> None:
    source = task.train
    source.images, source.labels = source.images.cuda(), source.labels.cuda()
    found = []
    for graph in (True, False):
        model = train(small().cuda(), source, Recipe(20, 8, 1e-3, narrow=False, graph=graph), seed=2)
        found.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 1e-3
