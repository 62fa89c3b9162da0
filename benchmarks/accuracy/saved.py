"""Networks that the experiments have trained, read back: dense ones and fine-tuned ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import wsp_compiler
from benchmarks.accuracy.experiments import Job
from benchmarks.accuracy.models import make
from examples import optional_module
from examples.pruned_file import load_pruned_state

CLASSES = 10


def job_of(path: Path) -> Job:
    """The job that wrote a fine-tuned network; ValueError for any other file."""
    with optional_module("safetensors").safe_open(str(path), "pt") as file:
        metadata: dict[str, str] = file.metadata() or {}
    if "job" not in metadata:
        raise ValueError(f"{path} was not written by benchmarks.accuracy.run")
    return Job.from_name(metadata["job"])


def load_dense(folder: Path, job: Job) -> nn.Module:
    """The dense network that `job` pruned, on the CPU in eval mode."""
    path = folder / (job.dense.name.replace("/", "_") + ".pt")
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: train it with benchmarks.accuracy.run --only {job.dense.name}")
    model = make(job.network, CLASSES)
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state)
    return model.eval()


def load_tuned(path: Path) -> nn.Module:
    """A fine-tuned network, on the CPU in eval mode; `wsp_compiler.compile` takes it."""
    job = job_of(path)
    model = wsp_compiler.prune(make(job.network, CLASSES), 0.5, method="wsp", importance="l2", tile=job.tile)
    return load_pruned_state(model, path)
