"""What is run: the list of jobs, most important first, and how one job becomes one row.

Every pruned network starts from a dense one that was trained for 200 epochs, and is fine-tuned for 40 (the ABWSP
paper's number) unless said otherwise. Accuracies are shares of the test images.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.accuracy import abwsp
from benchmarks.accuracy.methods import (
    Variant,
    kept_share,
    pruned,
    random_assignment,
    ratio_for_multiplies,
)
from benchmarks.accuracy.models import make
from benchmarks.accuracy.outlook import accuracy, adapt_norms
from benchmarks.accuracy.tasks import Task
from benchmarks.accuracy.training import Recipe, train
from benchmarks.results import Row
from examples.pruned_file import save_pruned

DENSE_EPOCHS, TUNED_EPOCHS = 200, 40
DENSE_RATE, TUNED_RATE = {"vgg16": 1e-3}, 1e-3
"""Peaks of the learning rate; of dense networks that are not listed: 0.002."""
SEEDS = (0, 1, 2)
RATIOS = (0.4, 0.6, 0.8)
PAPER = Variant()
OUTLOOK_PR = 0.8
CANDIDATES = 24
SAVED = ("methods", "one_plan")
"""Experiments whose networks are kept, for their times."""
MULTIPLIES = (0.2, 0.125, 0.09, 0.05)
"""Shares of the direct convolution's multiplications at which F(2x2) and F(4x4) are compared."""


@dataclass(frozen=True)
class Job:
    """One network trained, or pruned and fine-tuned.

    Args:
        experiment: which table or figure it belongs to; "dense" trains what the others prune.
        network, seed: which dense network, also the seed of the fine-tuning.
        method: of :mod:`benchmarks.accuracy.methods`, or "abwsp".
        candidate: number of a random assignment, for the outlook experiments.
    """

    experiment: str
    network: str
    seed: int
    method: str = "dense"
    pr: float = 0.0
    epochs: int = TUNED_EPOCHS
    importance: str = "l2"
    calibrated: bool = False
    tile: int = 2
    candidate: int = -1

    @property
    def name(self) -> str:
        """Stable and unique: what a record's rows are recognised by."""
        return "/".join(str(value) for value in asdict(self).values())

    @classmethod
    def from_name(cls, name: str) -> Job:
        """The job that has this name."""
        experiment, network, seed, method, pr, epochs, importance, calibrated, tile, candidate = name.split(
            "/"
        )
        return cls(
            experiment,
            network,
            int(seed),
            method,
            float(pr),
            int(epochs),
            importance,
            calibrated == "True",
            int(tile),
            int(candidate),
        )

    @property
    def dense(self) -> Job:
        """The job that has to be done before this one; a dense job needs none but itself."""
        return Job("dense", self.network, self.seed, epochs=DENSE_EPOCHS)


@dataclass(frozen=True)
class Workplace:
    """Where jobs run.

    Args:
        task: the images.
        folder: for the dense networks' weights, checkpoints and the weights of fine-tuned networks.
        device: that trains.
        batch: images of a step.
        shorten: every training is so many times shorter; for tests.
        times: layer times for ABWSP, "NETWORK/PR" -> what `wsp_compiler.balanced_speedup` returned for it.
    """

    task: Task
    folder: Path
    device: torch.device
    batch: int = 128
    shorten: int = 1
    times: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def recipe(self, epochs: int, rate: float) -> Recipe:
        """A training of so many epochs."""
        steps = epochs * max(1, len(self.task.train) // self.batch) // self.shorten
        return Recipe(max(1, steps), self.batch, rate)

    def file(self, job: Job, suffix: str = "") -> Path:
        """The weights of a job's network."""
        return self.folder / (job.name.replace("/", "_") + (suffix or ".pt"))

    def save(self, model: nn.Module, job: Job) -> None:
        """Keep the weights of a fine-tuned network, packed."""
        save_pruned(model, self.file(job, ".safetensors"), {"job": job.name})


def _grid(network: str, seeds: Sequence[int], methods: Sequence[str], ratios: Sequence[float]) -> list[Job]:
    return [
        Job("methods", network, seed, method, pr) for pr in ratios for seed in seeds for method in methods
    ]


def _epochs(network: str, ratios: Sequence[float], epochs: Sequence[int]) -> list[Job]:
    """Figures 11 and 12: accuracy against the pruning ratio after few and many epochs."""
    return [
        Job("epochs", network, 0, method, pr, epochs=count)
        for count in epochs
        for pr in ratios
        for method in ("wsp", "fp", "wwp")
    ]


def _outlook(network: str) -> list[Job]:
    shared: dict[str, Any] = {
        "network": network,
        "seed": 0,
        "method": "mixed",
        "pr": OUTLOOK_PR,
        "epochs": 10,
    }
    return [
        Job(experiment, candidate=number, **shared)
        for number in range(CANDIDATES)
        for experiment in ("outlook", "outlook_uneven")
    ]


def _ablation(network: str, seeds: Sequence[int]) -> list[Job]:
    variants = (("l2", False), ("output", False), ("output", True))
    return [
        Job("ablation", network, seed, "wsp", pr, importance=importance, calibrated=calibrated)
        for seed in seeds
        for pr in RATIOS
        for importance, calibrated in variants
    ]


def _tiles(network: str, seed: int) -> list[Job]:
    return [
        Job(
            "tiles",
            network,
            seed,
            "wsp",
            round(ratio_for_multiplies(share, tile), 4),
            importance="output",
            calibrated=True,
            tile=tile,
        )
        for share in MULTIPLIES
        for tile in (2, 4)
    ]


def _one_plan(network: str) -> list[Job]:
    return [
        Job("one_plan", network, 0, "wsp", pr, epochs=2 * TUNED_EPOCHS, importance="output", calibrated=True)
        for pr in (0.9, 0.85, 0.8, 0.7)
    ]


def all_jobs() -> list[Job]:
    """Every job, most important first; what a job needs comes before it."""
    small, others = "resnet20", ("resnet32", "vgg16", "resnet56")
    jobs = [Job("dense", small, seed, epochs=DENSE_EPOCHS) for seed in SEEDS]
    jobs += [Job("dense", network, 0, epochs=DENSE_EPOCHS) for network in others]
    jobs += _grid(small, SEEDS, ("wsp", "bwsp", "abwsp", "fp"), (0.8,))
    jobs += _outlook(small)[:24]
    jobs += _grid(small, SEEDS, ("wsp", "bwsp", "abwsp", "fp"), (0.6, 0.4))
    jobs += _one_plan(small)
    jobs += [job for network in others for job in _grid(network, (0,), ("wsp", "bwsp", "fp"), (0.8, 0.6))]
    jobs += _outlook(small)[24:]
    jobs += _grid(small, SEEDS, ("wwp",), RATIOS)
    jobs += _ablation(small, SEEDS[:1])
    jobs += _tiles(small, 0)
    jobs += [job for network in others for job in _grid(network, (0,), ("wwp", "abwsp"), (0.8,))]
    jobs += _epochs(small, (0.1, 0.3, 0.5, 0.7, 0.9), (1, 10, 100))
    jobs += _ablation(small, SEEDS[1:])
    jobs += _epochs("vgg16", (0.3, 0.5, 0.7, 0.9), (1, 10, 40))
    jobs += [
        job for network in others for job in _grid(network, (0,), ("wsp", "bwsp", "fp", "wwp"), (0.9, 0.4))
    ]
    return jobs


def dense_network(job: Job, place: Workplace) -> nn.Module:
    """The trained dense network that a job prunes, on the device."""
    model = make(job.network, place.task.classes, place.task.side, job.seed).to(place.device)
    state = torch.load(place.file(job.dense), map_location=place.device, weights_only=True)
    model.load_state_dict(state)
    return model.eval()


def _train_dense(job: Job, place: Workplace) -> Row:
    model = make(job.network, place.task.classes, place.task.side, job.seed).to(place.device)
    train(
        model,
        place.task.train,
        place.recipe(job.epochs, DENSE_RATE.get(job.network, 2e-3)),
        seed=job.seed,
        checkpoint=place.file(job, ".checkpoint"),
    )
    torch.save(model.state_dict(), place.file(job))
    return {"accuracy": accuracy(model, place.task.test)}


def fine_tune(model: nn.Module, job: Job, place: Workplace) -> nn.Module:
    """Fine-tune a pruned network in place, every method alike."""
    return train(model, place.task.train, place.recipe(job.epochs, TUNED_RATE), seed=1000 + job.seed)


def _prune(job: Job, place: Workplace) -> Row:
    dense, task = dense_network(job, place), place.task
    variant = Variant("wsp" if job.candidate >= 0 else job.method, job.importance, job.calibrated, job.tile)
    rules = []
    if job.candidate >= 0:
        rules = random_assignment(dense, job.pr, job.candidate, uneven=job.experiment == "outlook_uneven")
    begin = time.perf_counter()
    model = pruned(dense, variant, job.pr, task.calibration, rules)
    row: Row = {"prune_seconds": time.perf_counter() - begin, "kept": kept_share(model)}
    row["one_shot"] = accuracy(model, task.test)
    task.train.seed(job.seed)
    adapt_norms(model, task.train, max(2, 100 // place.shorten), place.batch)
    row |= {"outlook": accuracy(model, task.validation), "outlook_test": accuracy(model, task.test)}
    fine_tune(model, job, place)
    row["accuracy"] = accuracy(model, task.test)
    if job.experiment in SAVED:
        place.save(model, job)
    return row


def run_job(job: Job, place: Workplace) -> Row:
    """Do a job; the row names the job and holds what was found, or the failure."""
    begin = time.perf_counter()
    row: Row = {"name": job.name, **asdict(job), "task": place.task.name, "failure": None}
    try:
        if job.experiment == "dense":
            row |= _train_dense(job, place)
        elif job.method == "abwsp":
            row |= abwsp.run(job, place, dense_network(job, place), fine_tune)
        else:
            row |= _prune(job, place)
    except Exception as problem:
        row["failure"] = f"{type(problem).__name__}: {problem}".partition("\n")[0]
    return row | {"seconds": time.perf_counter() - begin}
