"""The state of a search on disk: what has been evaluated, measured and trained. Written in one step after every result.

A folder with `search.json` (outlook of every candidate, times, winners), both base plans, and the best network so far:

| file | written |
|---|---|
| search.json | after every candidate (with several processes: after one of each) and every round |
| wsp.safetensors, bwsp.safetensors | once, before the first candidate |
| round-N.safetensors, round-N.pt | plan and state_dict of the best round so far |
| finetune-N-of-RANKS.pt | checkpoint of a fine-tuning that is going on |
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from wsp_compiler.abwsp.choices import LayerPair
from wsp_compiler.errors import SearchError
from wsp_compiler.plan import PruningPlan

VERSION = 2
"""1: layers that balance does not make faster had a choice, too."""


@dataclass(frozen=True)
class Round:
    """A finished round: the assignment that won it, and its accuracy after fine-tuning."""

    winner: str
    accuracy: float


@dataclass
class SearchState:
    """All that a search knows besides tensors.

    Attributes:
        settings: what decides the outcome; a search goes on only with the same.
        times: see :class:`~wsp_compiler.abwsp.choices.Choices`.
        dense_accuracy: of the model as it was given.
        outlooks: assignment -> outlook accuracy.
        sampled: assignment -> the round that evaluated it.
        rounds: finished rounds in order.
    """

    settings: dict[str, Any]
    times: dict[str, LayerPair]
    dense_accuracy: float
    outlooks: dict[str, float] = field(default_factory=dict[str, float])
    sampled: dict[str, int] = field(default_factory=dict[str, int])
    rounds: list[Round] = field(default_factory=list[Round])

    def to_json(self) -> str:
        """As text; floats survive exactly."""
        record = {
            "version": VERSION,
            "settings": self.settings,
            "times": {path: [pair.wsp_us, pair.bwsp_us] for path, pair in self.times.items()},
            "dense_accuracy": self.dense_accuracy,
            "candidates": {name: [value, self.sampled[name]] for name, value in self.outlooks.items()},
            "rounds": [[entry.winner, entry.accuracy] for entry in self.rounds],
        }
        return json.dumps(record, indent=1)

    @classmethod
    def from_json(cls, text: str) -> SearchState:
        """The inverse of :meth:`to_json`; raises KeyError, TypeError or ValueError for anything else."""
        record: dict[str, Any] = json.loads(text)
        if record["version"] != VERSION:
            raise ValueError(f"version {record['version']}, this package reads {VERSION}")
        candidates: dict[str, Any] = record["candidates"]
        return cls(
            dict(record["settings"]),
            {path: LayerPair(float(wsp), float(bwsp)) for path, (wsp, bwsp) in record["times"].items()},
            float(record["dense_accuracy"]),
            {name: float(value) for name, (value, _) in candidates.items()},
            {name: int(index) for name, (_, index) in candidates.items()},
            [Round(str(winner), float(accuracy)) for winner, accuracy in record["rounds"]],
        )


class StateFolder:
    """The files of a search; ``StateFolder(None)`` keeps nothing."""

    def __init__(self, path: str | Path | None) -> None:
        self.path = None if path is None else Path(path)

    def _file(self, name: str) -> Path:
        assert self.path is not None
        return self.path / name

    def load(self, settings: Mapping[str, Any]) -> SearchState | None:
        """The state of an earlier run with the same settings; None if there is none.

        Raises:
            SearchError: the folder holds another search, or cannot be read.
        """
        if self.path is None:
            return None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not self._file("search.json").exists():
                return None
            state = SearchState.from_json(self._file("search.json").read_text(encoding="utf-8"))
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"cannot be read as a search's state ({type(error).__name__}: {error})"
            raise SearchError(
                what, where=str(self.path), fix="name another folder, or empty this one"
            ) from error
        now = json.loads(json.dumps(dict(settings)))
        names = [name for name in {**now, **state.settings} if now.get(name) != state.settings.get(name)]
        if names:
            changed = ", ".join(f"{name} {state.settings.get(name)!r} -> {now.get(name)!r}" for name in names)
            raise SearchError(
                f"it holds another search: {changed}",
                where=str(self.path),
                fix="name another folder, or search with the settings that it was begun with",
            )
        return state

    def save(self, state: SearchState) -> None:
        """Write search.json."""
        if self.path is not None:
            text = state.to_json()
            _replace(self._file("search.json"), lambda partial: partial.write_text(text, encoding="utf-8"))

    def save_plan(self, name: str, plan: PruningPlan) -> None:
        """Write one plan with its tensors."""
        if self.path is not None:
            _replace(self._file(f"{name}.safetensors"), plan.save)

    def load_plan(self, name: str) -> PruningPlan:
        """The plan that :meth:`save_plan` wrote."""
        return PruningPlan.load(self._file(f"{name}.safetensors"))

    def save_network(self, index: int, plan: PruningPlan, module: nn.Module) -> None:
        """Write the network of round ``index``."""
        if self.path is not None:
            self.save_plan(f"round-{index}", plan)
            state: dict[str, Tensor] = module.state_dict()
            _replace(self._file(f"round-{index}.pt"), lambda partial: torch.save(state, partial))

    def load_weights(self, index: int, module: nn.Module) -> None:
        """Fill the module of round ``index``, made of its plan, with the trained weights."""
        state: Any = torch.load(self._file(f"round-{index}.pt"), map_location="cpu", weights_only=True)
        module.load_state_dict(state)

    def checkpoint(self, index: int, ranks: int) -> Path | None:
        """Where the fine-tuning of a round on so many ranks keeps its own state."""
        return None if self.path is None else self._file(f"finetune-{index}-of-{ranks}.pt")

    def drop_networks(self, keep: int) -> None:
        """Remove the networks of all rounds but ``keep``, and checkpoints of what is finished."""
        if self.path is None:
            return
        for pattern in ("round-*", "finetune-*"):
            for file in self.path.glob(pattern):
                if file.stem != f"round-{keep}":
                    file.unlink(missing_ok=True)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file in one step: a killed run, or a computer that stops, leaves the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    write(partial)
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def digest(model: nn.Module) -> str:
    """A hash of the names, shapes, dtypes and values of everything in a model's state_dict."""
    found = hashlib.sha256()
    state = cast("Mapping[str, Any]", model.state_dict())
    for name, value in state.items():
        if isinstance(value, Tensor):
            found.update(f"{name} {list(value.shape)} {value.dtype}".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            found.update(flat.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
