"""ABWSP as a job of the experiments: `wsp_compiler.search` with the paper's criterion, fine-tuned as all others are.

Times of the layers are those that `benchmarks.accuracy.balance` has measured, if it has; else they come from the
paper's own reasoning (section 4.2): positions run side by side, and a layer takes as long as its longest matrix
product. Rows say which.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from benchmarks.accuracy.methods import Variant, kept_share, pruned, winograd_layers
from benchmarks.accuracy.outlook import accuracy
from benchmarks.results import Row
from wsp_compiler.abwsp import search

if TYPE_CHECKING:
    from benchmarks.accuracy.experiments import Job, Workplace

ALPHA, BETA, SAMPLES = 30.0, 3, 12
"""Percent, rounds and candidates a round; the paper has alpha=30, beta=5 and does not tell its sample."""
BATCHES = 20
"""Batches that statistics of batch norm are re-estimated on for each candidate."""
FineTune = Callable[[nn.Module, "Job", "Workplace"], nn.Module]


def longest_products(model: nn.Module, pr: float) -> dict[str, dict[str, float]]:
    """Path -> times of WSP and BWSP in units of one row of one position, and their ratio.

    Time is p*p times the largest number of rows that a position keeps.
    """
    rows: dict[str, list[float]] = {}
    for method in ("wsp", "bwsp"):
        for path, layer in winograd_layers(pruned(model, Variant(method), pr, [])).items():
            longest = layer.keep.sum(dim=1).max()
            rows.setdefault(path, []).append(float(longest) * len(layer.keep))
    return {path: {"wsp_us": wsp, "bwsp_us": bwsp, "ratio": wsp / bwsp} for path, (wsp, bwsp) in rows.items()}


def run(job: Job, place: Workplace, dense: nn.Module, fine_tune: FineTune) -> Row:
    """Search on the validation images, and what the test images say of the result."""
    task = place.task
    task.train.seed(job.seed)
    batches = [task.train.sample(place.batch)[0].cpu() for _ in range(max(2, BATCHES // place.shorten))]
    measured = place.times.get(f"{job.network}/{job.pr}")
    result = search(
        dense,
        job.pr,
        lambda model: accuracy(model, task.validation),
        batches,
        alpha=ALPHA,
        beta=max(1, BETA // place.shorten),
        samples=max(2, SAMPLES // place.shorten),
        finetune=lambda model: fine_tune(model, job, place),
        refit=False,
        importance=job.importance,
        tile=job.tile,
        seed=job.seed,
        state=place.file(job, ".search"),
        keep_slower=True,
        times=cast("Any", measured or longest_products(dense, job.pr)),
    )
    best = result.best
    place.save(result.model, job)
    return {
        "kept": kept_share(result.model),
        "outlook": best.outlook,
        "validation": best.accuracy,
        "accuracy": accuracy(result.model, task.test),
        "balanced_speedup": best.balanced_speedup,
        "balanced_layers": sum(method == "bwsp" for method in best.methods.values()),
        "layers": len(best.methods),
        "times": "measured" if measured else "longest matrix product",
        "candidates": [
            {"outlook": found.outlook, "balanced_speedup": found.balanced_speedup, "accuracy": found.accuracy}
            for found in result.candidates
        ],
    }
