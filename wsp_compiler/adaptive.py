"""ABWSP without an eval_fn: WSP or BWSP for each layer, by predicted output error and balanced speedup.

WSP keeps more of a layer's output, BWSP may run faster, since its p*p matrix products all take the same time. The
paper (section 4.3) takes, of the assignments with the best accuracy without fine-tuning, the one with the largest
balanced speedup. The proxy of that accuracy is the predicted squared error of the network's output, and the
assignment is found exactly: the fastest whose error is within a tolerance of WSP's everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from wsp_compiler.budget.allocate import allocate
from wsp_compiler.options import CompileOptions, PruneRule
from wsp_compiler.plan import BALANCE_GAIN, PruningPlan, make_plan
from wsp_compiler.sites import ConvSite
from wsp_compiler.speed import SpeedSource

TOLERANCE = 0.05
"""Predicted squared error that balance may add, as a share of WSP's: at most 0.2 dB of the error."""

Pair = tuple[float, float]
"""(WSP, BWSP)."""


def choose_patterns(
    errors: Mapping[str, Pair], times: Mapping[str, Pair | None], tolerance: float = TOLERANCE
) -> dict[str, str]:
    """ "wsp" or "bwsp" for every layer: least total time with a total error of at most (1 + tolerance) WSP's.

    Args:
        errors: path -> squared errors that add up over the layers.
        times: path -> microseconds; None, or left out, where unknown: such layers stay "wsp", as do those that
            balance makes faster by less than :data:`~wsp_compiler.plan.BALANCE_GAIN`.
        tolerance: 0 or more.
    """
    chosen = dict.fromkeys(errors, "wsp")
    pairs: dict[str, Pair] = {}
    for path in errors:
        pair = times.get(path)
        if pair is not None and pair[0] >= BALANCE_GAIN * pair[1]:
            pairs[path] = pair
    if not pairs:
        return chosen
    least = sum(min(errors[path]) for path in pairs)
    budget = sum(errors[path][0] for path in pairs) + tolerance * sum(error for error, _ in errors.values())
    layers = [list(zip(errors[path], pairs[path], strict=True)) for path in pairs]
    indices = allocate(layers, max(budget, least))
    assert indices is not None
    for path, index in zip(pairs, indices, strict=True):
        chosen[path] = ("wsp", "bwsp")[index]
    return chosen


def with_methods(
    sites: tuple[ConvSite, ...],
    convolutions: Mapping[str, nn.Conv2d],
    options: CompileOptions,
    methods: Mapping[str, str],
    speed: SpeedSource | None = None,
) -> PruningPlan:
    """The plan of ``options`` with another pattern in some layers, everything else as before.

    Args:
        methods: path -> "wsp" or "bwsp"; where a rule names a method, the rule wins. Layers that are not listed
            are as in ``options``.
    """
    rules: list[PruneRule] = []
    for path, method in methods.items():
        rule = options.rule_for(path) or PruneRule("")
        rules.append(replace(rule, match=re.escape(path), method=rule.method or method))
    options.check_rules_used(convolutions)
    return make_plan(sites, convolutions, replace(options, rules=(*rules, *options.rules)), speed)
