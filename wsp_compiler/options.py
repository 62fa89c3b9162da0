"""What the user asks for: :class:`CompileOptions` and :class:`PruneRule`, validated on construction."""

from __future__ import annotations

import difflib
import math
import numbers
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from wsp_compiler.errors import OptionError, RuleError

METHODS = ("wsp", "bwsp", "fp", "wwp", "dense")
METHOD_CHOICES = (*METHODS, "abwsp")
"""What a network can be given: "abwsp" chooses among "wsp" and "bwsp" for each layer."""
PR_SCOPES = ("global", "layer")
DIRECTIONS = ("row", "column")
TILES = (2, 4)
TILE_CHOICES = (*TILES, "auto")
TUNE_LEVELS = ("off", "fast", "full")
IMPORTANCES = ("output", "l2", "l1", "fpgm", "hrank")
PRECISIONS = ("fp32", "tf32", "fp16", "bf16")


def _check_choice(name: str, value: Any, choices: Sequence[Any], *, where: str = "compile") -> None:
    # 2.0 == 2 and numpy compares element by element: the type has to be right too
    if type(value) not in {type(choice) for choice in choices} or value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise OptionError(f"unknown {name} {value!r}", where=where, fix=f"{hint}use one of {listed}")


def _check_pruning_ratio(pr: Any, *, where: str = "compile") -> None:
    is_number = isinstance(pr, numbers.Real) and not isinstance(cast("object", pr), bool)
    if not is_number or math.isnan(pr) or not 0 <= float(pr) < 1:
        raise OptionError(
            f"pruning ratio pr={pr!r} is not a number in [0, 1)",
            where=where,
            fix="give the share of Winograd weights to remove, for example pr=0.8",
        )


def _check_budgets(options: CompileOptions) -> None:
    """pr_scope, target_latency and max_drop: their values, and that at most one says how much is pruned."""
    if options.pr_scope is not None:
        _check_choice("pr_scope", options.pr_scope, PR_SCOPES)
    limits = {"target_latency": options.target_latency, "max_drop": options.max_drop}
    examples = {"target_latency": "2.5 (milliseconds)", "max_drop": "0.3 (in eval_fn's own unit)"}
    for name, value in limits.items():
        if value is None:
            continue
        least = 0.0 if name == "max_drop" else math.ulp(0.0)
        is_number = isinstance(value, numbers.Real) and not isinstance(cast("object", value), bool)
        if not is_number or not math.isfinite(value) or value < least:
            raise OptionError(
                f"{name}={value!r} is not a {'number of at least 0' if least == 0 else 'positive number'}",
                where="compile",
                fix=f"for example {name}={examples[name]}",
            )
    if options.target_latency is not None and options.max_drop is not None:
        raise OptionError(
            "target_latency and max_drop both say how much is pruned", where="compile", fix="give one of them"
        )
    named = [name for name, value in (*limits.items(), ("pr_scope", options.pr_scope)) if value is not None]
    if options.method in ("fp", "dense") and named and options.pr_scope != "layer":
        raise OptionError(
            f"{named[0]} does not go with method={options.method!r}, which prunes all layers alike or not at all",
            where="compile",
            fix="use method='abwsp', 'wsp', 'bwsp' or 'wwp'",
        )
    if options.pr_scope == "layer" and (options.target_latency is not None or options.max_drop is not None):
        raise OptionError(
            "pr_scope='layer' prunes every layer alike, which target_latency and max_drop do not",
            where="compile",
            fix="leave out pr_scope",
        )


def _check_block(block: Any, *, where: str = "compile") -> None:
    if block is not None and (not isinstance(block, int) or isinstance(block, bool) or block < 1):
        raise OptionError(
            f"block={block!r} is not a number of filters",
            where=where,
            fix="give 1 or more, for example block=64, or None for what fits the kernels",
        )


@dataclass(frozen=True)
class PruneRule:
    """Options for the convolutions whose module path matches a regular expression.

    Args:
        match: regular expression, matched with ``re.fullmatch`` against the module path.
        method, direction, pr, tile, block: as in :func:`wsp_compiler.compile`; None inherits.
        skip: leave the matching convolutions alone.

    The first rule that matches a path wins. A rule that matches no convolution is an error.
    """

    match: str
    method: str | None = None
    direction: str | None = None
    pr: float | None = None
    tile: int | str | None = None
    skip: bool = False
    block: int | None = None

    def __post_init__(self) -> None:
        where = f"PruneRule({self.match!r})"
        try:
            if not isinstance(cast("object", self.match), str):
                raise TypeError(f"{type(self.match).__name__}, not str")
            re.compile(self.match)
        except (re.error, TypeError, OverflowError, RecursionError) as error:
            raise RuleError(
                f"not a regular expression ({error})",
                where=where,
                fix="give a string for re.fullmatch, for example r'layer1\\.0\\.conv1'",
            ) from error
        if not isinstance(cast("object", self.skip), bool):
            raise OptionError(f"skip={self.skip!r} is not True or False", where=where, fix="use skip=True")
        if self.method is not None:
            _check_choice("method", self.method, METHODS, where=where)
        if self.direction is not None:
            _check_choice("direction", self.direction, DIRECTIONS, where=where)
        if self.tile is not None:
            _check_choice("tile", self.tile, TILE_CHOICES, where=where)
        _check_block(self.block, where=where)
        if self.pr is not None:
            _check_pruning_ratio(self.pr, where=where)

    def matches(self, path: str) -> bool:
        """True if the rule applies to the module at ``path``."""
        return re.fullmatch(self.match, path) is not None


@dataclass(frozen=True)
class CompileOptions:
    """Every choice of :func:`wsp_compiler.compile` that decides what is pruned and how it is computed.

    Args:
        pr: share of the Winograd weights removed in each layer, in [0, 1).
        method: "wsp", "bwsp", "fp", "wwp", "dense" (Winograd, nothing pruned; ``pr`` is ignored) or "abwsp" ("wsp" or
            "bwsp" for each layer).
        direction: "row" or "column" of each position's matrix (not used by "fp", "wwp" and "dense").
        tile: output tile side m of F(m x m, 3x3), 2 or 4, or "auto": the faster of both where times are known.
        importance: how units are scored: "output" (energy in the layer's output) "l2" (the paper's),
            "l1", "fpgm" (distance from the geometric median) or "hrank" (rank of feature maps; needs
            calibration, scores filters alone).
        rules: per-layer overrides.
        precision: arithmetic inside the Winograd layers, or None to follow the model.
        channel_threshold: layers with fewer input or output channels are left alone unless a rule names them.
        block: for method "bwsp" with rows: the same number of kept rows in every position and group of ``block``
            consecutive filters (the largest divisor of n up to it); None picks what fits the kernels.
        keep_slower: lower layers also where the vendor's dense convolution is known to be faster.
        tune: "off", "fast" or "full": how much is measured where no times are known.
        pr_scope: "global": ``pr`` holds for all layers together; "layer": for each; None: for each, unless compile
            is given calibration data.
        target_latency: milliseconds of the whole network; ``pr`` is not read.
        max_drop: of the user's eval_fn; ``pr`` is not read.

    Raises:
        OptionError: a value is out of its range.
    """

    pr: float = 0.8
    method: str = "abwsp"
    direction: str = "row"
    tile: int | str = 2
    importance: str = "output"
    rules: tuple[PruneRule, ...] = ()
    precision: str | None = None
    channel_threshold: int = 16
    block: int | None = None
    keep_slower: bool = False
    tune: str = "off"
    pr_scope: str | None = None
    target_latency: float | None = None
    max_drop: float | None = None

    def __post_init__(self) -> None:
        _check_pruning_ratio(self.pr)
        _check_choice("method", self.method, METHOD_CHOICES)
        _check_budgets(self)
        _check_choice("direction", self.direction, DIRECTIONS)
        _check_choice("tile", self.tile, TILE_CHOICES)
        _check_choice("tune", self.tune, TUNE_LEVELS)
        _check_block(self.block)
        if not isinstance(cast("object", self.keep_slower), bool):
            raise OptionError(
                f"keep_slower={self.keep_slower!r} is not True or False",
                where="compile",
                fix="use True or False",
            )
        _check_choice("importance", self.importance, IMPORTANCES)
        if self.precision is not None:
            _check_choice("precision", self.precision, PRECISIONS)
        threshold = cast("object", self.channel_threshold)
        if not isinstance(threshold, int) or isinstance(threshold, bool) or threshold < 0:
            raise OptionError(
                f"channel_threshold={threshold!r} is not a whole number of channels",
                where="CompileOptions",
                fix="use 0 or more",
            )
        for rule in self.rules:
            if not isinstance(cast("object", rule), PruneRule):
                raise OptionError(
                    f"rules contains {rule!r}", where="compile", fix="pass wsp_compiler.PruneRule objects"
                )
        methods = {self.method, *(rule.method for rule in self.rules if rule.method is not None)}
        if self.importance == "hrank" and not methods <= {"fp", "dense"}:
            raise OptionError(
                "importance='hrank' scores filters alone, not what "
                f"method={min(methods - {'fp', 'dense'})!r} removes",
                where="compile",
                fix="use method='fp', or another importance",
            )

    def rule_for(self, path: str) -> PruneRule | None:
        """The first rule that matches ``path``."""
        return next((rule for rule in self.rules if rule.matches(path)), None)

    def check_rules_used(self, paths: Iterable[str]) -> None:
        """Raise :class:`RuleError` for a rule that matches none of ``paths``."""
        known = sorted(paths)
        for rule in self.rules:
            if any(rule.matches(path) for path in known):
                continue
            near = difflib.get_close_matches(rule.match.replace("\\", ""), known, n=5, cutoff=0.3)
            names = ", ".join(near or known[:5])
            hint = (
                f"{'near names' if near else 'the first names'}: {names}"
                if names
                else "the model has no Conv2d"
            )
            raise RuleError(
                "the rule matches no convolution",
                where=f"PruneRule({rule.match!r})",
                fix=f"the expression must match a whole module path; {hint}",
            )
