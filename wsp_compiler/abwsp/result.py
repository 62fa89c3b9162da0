"""What a search has found: the best plan and module, every candidate, and how far the outlook can be trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from wsp_compiler.abwsp.choices import LayerPair
from wsp_compiler.plan import PruningPlan
from wsp_compiler.report import format_table

LITTLE = 1.03
"""Total balanced speedup below which the report says that balance gains next to nothing."""


@dataclass(frozen=True)
class Candidate:
    """One assignment of WSP or BWSP to the layers.

    Attributes:
        methods: layer path -> "wsp" or "bwsp", of the layers that have a choice.
        outlook: eval_fn of the pruned network with adapted batch norms, before any training.
        balanced_speedup: sum of t_WSP / sum of the chosen patterns' times.
        round: the round that sampled it first, from 0.
        won: the round that it won, or None.
        accuracy: eval_fn after fine-tuning (and the refit), if it won a round.
    """

    methods: Mapping[str, str]
    outlook: float
    balanced_speedup: float
    round: int
    won: int | None = None
    accuracy: float | None = None


@dataclass(frozen=True)
class SearchResult:
    """What :func:`wsp_compiler.search` returns.

    Attributes:
        plan: the best candidate's plan, for ``compile(model, plan=...)``: what is pruned, with refitted weights (if
            asked for) and batch-norm statistics, and without what fine-tuning has changed.
        model: the best candidate as a trainable module in eval mode, fine-tuned if that was asked for; ``compile``
            takes it as it is.
        best: the candidate that both are of.
        candidates: all that were evaluated, best outlook first.
        dense_accuracy: eval_fn of the model as it was given.
        times: layer path -> microseconds of both patterns, where known; balanced speedups are of these.
    """

    plan: PruningPlan
    model: nn.Module = field(repr=False)
    best: Candidate
    candidates: tuple[Candidate, ...] = field(repr=False)
    dense_accuracy: float
    times: Mapping[str, LayerPair] = field(repr=False)

    @property
    def winners(self) -> tuple[Candidate, ...]:
        """The winner of every round, in order."""
        found = [candidate for candidate in self.candidates if candidate.won is not None]
        return tuple(sorted(found, key=lambda candidate: candidate.won or 0))

    @property
    def rank_correlation(self) -> float:
        """Spearman's rho between the winners' outlook and their accuracy after fine-tuning; NaN if undefined."""
        known = [(entry.outlook, entry.accuracy) for entry in self.winners if entry.accuracy is not None]
        return spearman([outlook for outlook, _ in known], [accuracy for _, accuracy in known])

    def report(self) -> str:
        """All candidates as a table, and what has been found."""
        layers = list(self.best.methods)
        header = ("won", "accuracy", "outlook", "BS", "sampled", "assignment")
        rows = [
            (
                "" if entry.won is None else f"round {entry.won + 1}",
                "" if entry.accuracy is None else f"{entry.accuracy:.6g}",
                f"{entry.outlook:.6g}",
                f"{entry.balanced_speedup:.3f}",
                f"round {entry.round + 1}",
                "".join("B" if method == "bwsp" else "W" for method in entry.methods.values()) or "no choice",
            )
            for entry in self.candidates
        ]
        rho = self.rank_correlation
        lines = [
            format_table(header, rows),
            "",
            f"B = BWSP, W = WSP, for the layers {', '.join(layers) or '(none)'}",
            f"dense accuracy {self.dense_accuracy:.6g}",
            f"best accuracy {self.best.accuracy:.6g}, BS {self.best.balanced_speedup:.3f}",
            "Spearman's rho of outlook and accuracy over the winners: "
            + ("undefined" if math.isnan(rho) else f"{rho:.2f}"),
        ]
        if not self.times:
            lines.append("no layer's time is known: BS is 1 throughout, and outlook accuracy alone decides")
        else:
            wsp, bwsp = (
                sum(getattr(pair, name) for pair in self.times.values()) for name in ("wsp_us", "bwsp_us")
            )
            little = wsp < LITTLE * bwsp
            lines.append(
                f"balance gains {wsp / bwsp:.3f}x over all of these layers"
                + (": next to nothing, as where positions do not run side by side (CPUs)" if little else "")
            )
        return "\n".join(lines)


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """Spearman's rank correlation of paired values, equal values sharing their mean rank.

    Returns:
        In [-1, 1]; NaN with fewer than two pairs, or if one side is constant.

    Raises:
        ValueError: the lengths differ.
    """
    if len(left) != len(right):
        raise ValueError(f"{len(left)} values beside {len(right)}")
    a, b = (_ranks(values) for values in (left, right))
    if len(left) < 2 or a.std() == 0 or b.std() == 0:
        return math.nan
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt())


def _ranks(values: Sequence[float]) -> torch.Tensor:
    x = torch.tensor(values, dtype=torch.float64)
    return ((x[:, None] > x).sum(1) + (x[:, None] >= x).sum(1)).double() / 2
