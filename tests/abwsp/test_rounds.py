"""Rounds: the winner of a sample, and what a search evaluates, repeats and keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.abwsp.problem import Fidelity, batches, net, plans
from wsp_compiler.abwsp.choices import Choices, LayerPair
from wsp_compiler.abwsp.outlook import Networks
from wsp_compiler.abwsp.ranks import Ranks
from wsp_compiler.abwsp.rounds import Search, pick_winner
from wsp_compiler.abwsp.state import Round, SearchState, StateFolder
from wsp_compiler.batches import calibration_calls

OUTLOOKS = {"00": 0.9, "01": 0.8, "10": 0.8, "11": 0.1}
SPEEDUPS = {"00": 1.0, "01": 1.2, "10": 1.3, "11": 2.0}


@pytest.mark.parametrize(
    ("alpha", "winner"),
    [(100, "11"), (75, "10"), (51, "10"), (50, "10"), (25, "00"), (1e-9, "00")],
)
def test_speed_decides_within_the_best_alpha_percent(alpha: float, winner: str) -> None:
    """At 50 % two are in, and a third with the same outlook."""
    assert pick_winner(list(OUTLOOKS), OUTLOOKS, SPEEDUPS.__getitem__, alpha) == winner


def test_equal_speeds_go_to_the_better_outlook_then_to_the_first() -> None:
    assert pick_winner(["10", "01", "00"], OUTLOOKS, lambda name: 1.0, 100) == "00"
    assert pick_winner(["10", "01"], OUTLOOKS, lambda name: 1.0, 100) == "01"


def search(tmp_path: Path | None = None, **changes: Any) -> Search:
    model = net()
    times = {"conv1": LayerPair(10, 8), "conv2": LayerPair(10, 9.5), "conv4": LayerPair(20, 12)}
    values: dict[str, Any] = {
        "networks": Networks.of(model, calibration_calls(batches(), model), Fidelity(model), None),
        "choices": Choices(*plans(), times), "alpha": 30.0, "beta": 3, "samples": 6, "finetune": None,
        "refit": False, "seed": 0, "ranks": Ranks(), "state": SearchState({}, times, 90.0),
        "folder": StateFolder(tmp_path),
    }  # fmt: skip
    if tmp_path is not None:
        tmp_path.mkdir(exist_ok=True)
    return Search(**{**values, **changes})


def test_rounds_have_winners_of_their_own_sample() -> None:
    task = search()
    texts: list[str] = []
    task.on_step = texts.append
    found = task.run()
    winners = [entry.winner for entry in task.state.rounds]
    assert len(set(winners)) == len(winners) == 3
    assert texts[0] == "round 1: candidate 1 of 6"
    assert sum("refit of the winner" in text for text in texts) == 3
    assert len(found.candidates) == len(task.state.outlooks) == sum("candidate" in text for text in texts)
    assert 6 < len(found.candidates) <= 16  # rounds draw anew, and nothing is evaluated twice
    by_outlook = [entry.outlook for entry in found.candidates]
    assert by_outlook == sorted(by_outlook, reverse=True)
    for entry in found.candidates:
        assert entry.balanced_speedup == task.choices.total_speedup(
            "".join("1" if method == "bwsp" else "0" for method in entry.methods.values())
        )
    # without training and refit a winner's accuracy is its outlook, hence the best winner's the best
    assert [entry.accuracy for entry in found.winners] == [entry.outlook for entry in found.winners]
    assert found.best is max(found.winners, key=lambda entry: entry.outlook)
    assert found.rank_correlation == pytest.approx(1)


def test_the_winner_is_the_fastest_of_the_best() -> None:
    found = search(beta=1, samples=16, alpha=25).run()
    best = found.candidates[:4]
    assert found.best is max(best, key=lambda entry: entry.balanced_speedup)
    everything = search(beta=1, samples=16, alpha=100).run()
    assert {everything.best.methods[path] for path in everything.times} == {"bwsp"}


def test_a_search_ends_when_every_assignment_has_won() -> None:
    rules: dict[str, Any] = {"choices": Choices(*plans(tile=4), {})}
    task = search(beta=40, samples=4, networks=search().networks, **rules)
    task.networks = Networks(net(), [], lambda model: 1.0, None, {})
    assert len(task.run().winners) == 16


def test_fine_tuning_decides(tmp_path: Path) -> None:
    """Whichever round is trained best is kept, in memory and on disk."""
    rounds = iter((0.5, 2.0, 1.0))
    marks: list[float] = []

    def train(module: nn.Module) -> None:
        marks.append(next(rounds))
        with torch.no_grad():
            module.get_submodule("classifier").bias.fill_(marks[-1])  # type: ignore[union-attr, operator]

    class Bias:
        def __call__(self, module: nn.Module) -> float:
            return module.get_submodule("classifier").bias[0].item()  # type: ignore[union-attr, index]

    task = search(tmp_path / "state", finetune=train)
    task.networks = Networks(task.networks.model, [], Bias(), None, {})
    found = task.run()
    assert found.best.accuracy == 2.0
    assert found.best.won == 1
    assert found.model.get_submodule("classifier").bias[0].item() == 2.0  # type: ignore[union-attr, index]
    again = search(tmp_path / "state", finetune=train)
    again.networks = task.networks
    again.state = task.state
    reloaded = again.run()
    assert marks == [0.5, 2.0, 1.0]  # nothing was left to do
    assert reloaded.best == found.best
    assert reloaded.plan == found.plan
    for name, tensor in found.model.state_dict().items():
        assert torch.equal(tensor, reloaded.model.state_dict()[name])


def test_of_equal_accuracies_the_faster_is_best() -> None:
    task = search()
    task.state.rounds = [Round("0000", 1.0), Round("1001", 1.0), Round("1001", 1.0), Round("1111", 0.5)]
    assert task.best_round() == 1


def test_a_refit_makes_winners_better() -> None:
    plain, fitted = search(beta=1), search(beta=1, refit="layers")
    a, b = plain.run(), fitted.run()
    assert a.best.methods == b.best.methods
    assert a.best.accuracy is not None
    assert b.best.accuracy is not None
    assert b.best.accuracy > a.best.accuracy + 0.5
    assert set(b.plan.refits) == set(b.best.methods)


def test_candidates_can_be_judged_as_refitted() -> None:
    """Then nothing changes for a winner that is not trained."""
    found = search(beta=1, refit="candidates").run()
    assert found.best.accuracy == found.best.outlook
    assert set(found.plan.refits) == set(found.best.methods)
    assert found.best.outlook > search(beta=1).run().best.outlook + 0.5
