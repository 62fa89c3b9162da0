"""search: the whole, its result compiled, interrupted and continued, and what it refuses."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wsp_compiler
from tests.abwsp.interrupted import run
from tests.abwsp.problem import PATHS, PR, Fidelity, batches, labelled, net, options
from tests.reference import assert_untouched, relative_error, snapshot
from wsp_compiler import PruneRule
from wsp_compiler.errors import EvaluationError, InputError, ModelError, OptionError, SearchError
from wsp_compiler.plan import BALANCE_GAIN
from wsp_compiler.winograd import transform_weight


def search(model: nn.Module | None = None, **changes: Any) -> wsp_compiler.SearchResult:
    model = net() if model is None else model
    return wsp_compiler.search(model, PR, Fidelity(model), batches(), **options(**changes))


def test_plan_and_module_compile_to_the_same() -> None:
    model = net()
    before = snapshot(model)
    found = search(model)
    assert_untouched(model, before)
    assert found.dense_accuracy == pytest.approx(90)
    x = batches(1, seed=5)[0]
    with torch.no_grad():
        wanted = found.model(x)
    by_plan = wsp_compiler.compile(model, plan=found.plan, example_inputs=x, keep_slower=True)
    by_module = wsp_compiler.compile(found.model, example_inputs=x, keep_slower=True)
    assert relative_error(by_plan(x), wanted) < 1e-5
    assert relative_error(by_module(x), wanted) < 1e-5
    assert found.best.accuracy == pytest.approx(Fidelity(model)(by_plan.graph_module.eval()), abs=1e-3)
    assert {path: found.plan[path].method for path in PATHS} == found.best.methods


def test_fine_tuning_raises_the_accuracy() -> None:
    model = net()
    settings = {"data": [x for x, _ in labelled(8)], "teacher": model, "steps": 40, "learning_rate": 2e-3}
    plain, tuned = search(model, beta=1), search(model, beta=1, finetune=settings)
    assert tuned.best.methods == plain.best.methods
    assert tuned.best.outlook == plain.best.outlook
    assert tuned.best.accuracy is not None
    assert plain.best.accuracy is not None
    assert tuned.best.accuracy > plain.best.accuracy + 0.2
    compiled = wsp_compiler.compile(tuned.model)
    x = batches(1, seed=5)[0]
    with torch.no_grad():
        assert relative_error(compiled.graph_module(x), tuned.model(x)) < 1e-5


def test_the_same_seed_gives_the_same_search() -> None:
    first, again, other = (search(refit=False, seed=seed) for seed in (0, 0, 1))
    assert first.candidates == again.candidates
    assert first.plan == again.plan
    sampled = [{tuple(entry.methods.values()) for entry in found.candidates} for found in (first, other)]
    assert sampled[0] != sampled[1]


def test_rules_are_kept() -> None:
    found = search(rules=[PruneRule("conv1", pr=0.25), PruneRule("conv2", method="fp")], beta=1)
    assert set(found.best.methods) == {"conv1", "conv3", "conv4"}
    assert found.plan["conv1"].kept_fraction == 0.75
    assert found.plan["conv2"].method == "fp"


def test_as_the_paper_prunes() -> None:
    found = search(importance="l2", refit=False, block=10**6, beta=1)
    assert not found.plan.refits
    assert {entry.block for entry in found.plan.values()} == {None}
    U = transform_weight(net().get_submodule("conv1").weight, 2)  # type: ignore[arg-type, union-attr]
    norms, keep = U.square().sum(2), found.plan["conv1"].keep[:, :, 0]  # [p*p, n]
    if found.best.methods["conv1"] == "wsp":
        assert norms[keep].min() >= norms[~keep].max()
    else:
        assert all(norms[k][keep[k]].min() >= norms[k][~keep[k]].max() for k in range(16))
    assert set(found.plan.norms) == {f"norm{i}" for i in range(5)}


def test_on_the_cpu_times_are_measured() -> None:
    """Both patterns of a layer."""
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU()).eval()
    x = torch.randn(2, 16, 12, 12, generator=torch.Generator().manual_seed(1))
    found = wsp_compiler.search(model, 0.5, lambda module: 1.0, x, beta=1, keep_slower=True)
    assert set(found.times) == {"0"}
    pair = found.times["0"]
    assert pair.wsp_us > 0
    assert pair.bwsp_us > 0
    assert len(found.candidates) == (2 if pair.bwsp_us * BALANCE_GAIN <= pair.wsp_us else 1)
    assert found.best.balanced_speedup == max(entry.balanced_speedup for entry in found.candidates)


def kill(folder: Path, until: Any) -> None:
    """Start the search in a process of its own; SIGKILL a random moment after ``until()``."""
    script = Path(__file__).with_name("interrupted.py")
    process = subprocess.Popen([sys.executable, str(script), str(folder), "0.03"])
    try:
        deadline = time.monotonic() + 120
        while not until():
            assert process.poll() is None, "it ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(random.SystemRandom().random() * 0.1)
        assert process.poll() is None, "it ended by itself"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_a_killed_search_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    wanted = run(None)
    folder = tmp_path / "state"
    least = random.SystemRandom().randint(1, 5)

    def candidates() -> bool:
        file = folder / "search.json"
        return file.exists() and len(json.loads(file.read_text())["candidates"]) >= least

    kill(folder, candidates)
    index = random.SystemRandom().randint(0, 2)
    kill(folder, lambda: (folder / f"finetune-{index}-of-1.pt").exists())
    held = json.loads((folder / "search.json").read_text())
    assert len(held["candidates"]) >= least
    found = run(folder)
    assert found.best == wanted.best
    assert found.candidates == wanted.candidates
    assert found.plan == wanted.plan
    for name, tensor in wanted.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], tensor)
    assert sorted(file.name for file in folder.iterdir()) == [
        "bwsp.safetensors", f"round-{wanted.best.won}.pt", f"round-{wanted.best.won}.safetensors",
        "search.json", "wsp.safetensors",
    ]  # fmt: skip


def test_a_finished_search_is_read_and_can_be_prolonged(tmp_path: Path) -> None:
    model = net()
    fidelity = Fidelity(model)

    def go(beta: int) -> wsp_compiler.SearchResult:
        return wsp_compiler.search(model, PR, fidelity, batches(), **options(beta=beta, state=tmp_path))

    first, calls = go(2), fidelity.calls
    again = go(2)
    assert fidelity.calls == calls
    assert again.candidates == first.candidates
    longer = go(3)
    assert len(longer.winners) == 3
    assert [entry.methods for entry in longer.winners[:2]] == [entry.methods for entry in first.winners]
    with pytest.raises(SearchError, match=r"another search: alpha 30\.0 -> 20\.0"):
        search(model, state=tmp_path, alpha=20)
    other = net()
    with torch.no_grad():
        other.get_submodule("classifier").bias.add_(1)  # type: ignore[union-attr, operator]
    with pytest.raises(SearchError, match="another search: model"):
        search(other, state=tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 0}, r"alpha=0 is not a percentage in \(0, 100\]"),
        ({"alpha": 100.1}, "alpha=100.1"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"alpha": True}, "alpha=True"),
        ({"alpha": "30"}, "alpha='30'"),
        ({"beta": 0}, "beta=0 is not a whole number of at least 1"),
        ({"beta": 1.0}, "beta=1.0"),
        ({"samples": 0}, "samples=0"),
        ({"seed": -1}, "seed=-1"),
        ({"refit": True}, "refit=True is none of 'layers', 'candidates' and False"),
        ({"refit": "all"}, "refit='all'"),
        ({"finetune": 3}, "finetune is a int"),
        ({"importance": "l3"}, "unknown importance"),
        ({"tile": 3}, "unknown tile"),
    ],
)
def test_values_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        search(**changes)


def test_bad_functions_and_data() -> None:
    model = net()
    fidelity = Fidelity(model)

    def go(eval_fn: Any, data: Any) -> None:
        wsp_compiler.search(model, PR, eval_fn, data, **options())

    def broken(module: nn.Module) -> float:
        raise KeyError("label")

    with pytest.raises(OptionError, match="eval_fn is a int"):
        go(3, batches())
    with pytest.raises(EvaluationError, match="it raised KeyError on the dense model"):
        go(broken, batches())
    with pytest.raises(EvaluationError, match="it returned nan"):
        go(lambda module: torch.tensor(float("nan")), batches())
    with pytest.raises(EvaluationError, match="it returned a str"):
        go(lambda module: "good", batches())
    with pytest.raises(InputError, match="holds no batch"):
        go(fidelity, [])
    with pytest.raises(InputError, match="NaN or infinite"):
        go(fidelity, torch.full((4, 3, 16, 16), float("inf")))
    with pytest.raises(InputError, match="fails on"):
        go(fidelity, torch.randn(4, 4, 16, 16))
    with pytest.raises(OptionError, match="calibration is a int"):
        go(fidelity, 3)
    with pytest.raises(ModelError, match="train mode"):
        wsp_compiler.search(net().train(), PR, fidelity, batches(), **options())
    with pytest.raises(ModelError, match="no convolution is left to prune"):
        wsp_compiler.search(nn.Linear(3, 3).eval(), PR, lambda module: 1.0, torch.randn(4, 3), **options())


def test_labels_are_dropped() -> None:
    model = net()
    pairs = [(x, torch.arange(len(x))) for x in batches()]
    found = wsp_compiler.search(model, PR, Fidelity(model), pairs, **options(beta=1))
    assert found.best == search(model, beta=1).best


def test_models_without_batch_norms_and_with_several_arguments() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)) + y)

    generator = torch.Generator().manual_seed(0)
    data = [
        {
            "x": torch.randn(4, 16, 10, 10, generator=generator),
            "y": torch.randn(4, 16, 8, 8, generator=generator),
        }
        for _ in range(2)
    ]
    model = Two().eval()

    def fidelity(module: nn.Module) -> float:
        return -relative_error(module(**data[0]), model(**data[0]))

    found = wsp_compiler.search(model, 0.5, fidelity, data, samples=4, beta=1, tune="off", times={})
    assert len(found.candidates) == 4
    assert {entry.balanced_speedup for entry in found.candidates} == {1.0}
    # nothing is known of speed: the best outlook wins
    assert found.best is found.candidates[0]
