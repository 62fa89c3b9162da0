"""search: the whole of ABWSP (paper, section 4.3): which layers take WSP and which BWSP."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from wsp_compiler.abwsp.choices import LayerPair
from wsp_compiler.abwsp.finetuning import Finetune, check_finetune
from wsp_compiler.abwsp.result import SearchResult
from wsp_compiler.abwsp.run import ALPHA, ROUNDS, SAMPLES, Request, run
from wsp_compiler.errors import OptionError
from wsp_compiler.evaluation import EvalFn
from wsp_compiler.options import CompileOptions, PruneRule

if TYPE_CHECKING:
    from wsp_compiler.speedup import BalancedSpeedup

REFITS = ("layers", "candidates")


def search(
    model: nn.Module,
    pr: float,
    eval_fn: EvalFn,
    calibration: Any,
    *,
    alpha: float = ALPHA,
    beta: int = ROUNDS,
    samples: int = SAMPLES,
    finetune: Finetune = None,
    refit: str | bool = "layers",
    state: str | Path | None = None,
    seed: int = 0,
    example_inputs: Any = None,
    direction: str = "row",
    tile: int | str = 2,
    block: int | None = None,
    importance: str = "output",
    rules: Iterable[PruneRule] = (),
    precision: str | None = None,
    target: Any = None,
    tune: str = "fast",
    keep_slower: bool = False,
    times: Mapping[str, BalancedSpeedup] | None = None,
) -> SearchResult:
    """Choose WSP or BWSP for every layer: fast where balance costs nothing, accurate where it does (ABWSP).

    Every round draws ``samples`` assignments, takes the outlook accuracy of each (prune, adapt the batch norms on the
    calibration data, evaluate), picks the one with the largest total balanced speedup within the best ``alpha`` % by
    outlook, and fine-tunes it; the best network after ``beta`` rounds is the result. Started by torchrun, candidates
    are spread over the processes and fine-tuning is data-parallel. docs/search.md has the whole story.

    Args:
        model: in eval mode, on the device that it shall run on; not modified.
        pr: share of the Winograd weights to remove from each layer, in [0, 1).
        eval_fn: takes an ordinary module of the model's class in eval mode (no kernels are generated), returns its
            quality as a number, higher is better. It must judge by data of its own, the same ones every time.
        calibration: inputs without labels, as for :func:`wsp_compiler.compile`; the paper uses about 100 batches.
        alpha: percent of a round's candidates among which speed decides, in (0, 100]; the paper's is 30.
        beta: rounds, in the paper 5. Fewer are run if every assignment has won one.
        samples: candidates per round, by default 50. If no more are left, all are evaluated instead of a sample.
        finetune: a function that trains the module it gets and returns it or None (with several processes it gets a
            DistributedDataParallel), or settings of :func:`wsp_compiler.finetune` such as
            ``{"data": loader, "steps": 1000}``, or None.
        refit: least-squares refit of the kept weights. "layers": every layer once under both patterns, each for itself,
            which candidates are put together from, and every winner as the network that it is. "candidates": every
            candidate as the network that it is; takes a calibration each, and tells most. False: none, as in the paper.
        state: folder that the search is kept in after every candidate; a search that finds its own state there goes
            on from it, and ends with what it would have ended with.
        seed: of all that is drawn here and by eval_fn and finetune (Python's, numpy's and PyTorch's generators).
        example_inputs: give the layers' shapes for timing, as for :func:`wsp_compiler.compile`; by default the first
            calibration batch.
        direction, tile, block, importance, rules, precision, target, keep_slower: as for
            :func:`wsp_compiler.compile`; a rule's method is not searched over. The paper's own setting is
            importance="l2", a block of all filters (such as 10**6), refit=False.
        tune: "fast" and "full" measure what is not known about the layers' times, "off" asks records alone. On the
            CPU positions are not run side by side and balanced speedups are near 1.
        times: use these of :func:`wsp_compiler.balanced_speedup` instead, for instance of another machine.

    Returns:
        A :class:`SearchResult`: ``compile(model, plan=result.plan)`` without fine-tuning,
        ``compile(result.model)`` with.

    Raises:
        WspError: OptionError, InputError and ModelError as for compile; EvaluationError: eval_fn raises or returns no
            finite number; SearchError: ``state`` holds another search, or another process failed.
    """
    options = CompileOptions(
        pr, "wsp", direction, tile, importance, tuple(rules), precision,
        block=block, keep_slower=keep_slower, tune=tune,
    )  # fmt: skip
    _check(alpha, beta, samples, seed)
    _check_refit(refit)
    check_finetune(finetune)
    if not callable(eval_fn):
        raise OptionError(
            f"eval_fn is a {type(cast('object', eval_fn)).__name__}",
            where="search",
            fix="give a function of a module",
        )
    request = Request(
        options, eval_fn, calibration, alpha, beta, samples, finetune, refit, state, seed, example_inputs, target,
        None if times is None else _pairs(times),
    )  # fmt: skip
    return run(model, request)


def _check(alpha: Any, beta: Any, samples: Any, seed: Any) -> None:
    number = isinstance(alpha, numbers.Real) and not isinstance(cast("object", alpha), bool)
    if not number or math.isnan(alpha) or not 0 < float(alpha) <= 100:
        raise OptionError(
            f"alpha={alpha!r} is not a percentage in (0, 100]", where="search", fix="the paper's is alpha=30"
        )
    for name, value, least in (("beta", beta, 1), ("samples", samples, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise OptionError(
                f"{name}={value!r} is not a whole number of at least {least}",
                where="search",
                fix=f"give {least} or more",
            )


def _check_refit(refit: Any) -> None:
    if refit is not False and (not isinstance(refit, str) or refit not in REFITS):
        raise OptionError(
            f"refit={refit!r} is none of {', '.join(map(repr, REFITS))} and False",
            where="search",
            fix='"layers" is the default',
        )


def _pairs(times: Mapping[str, BalancedSpeedup]) -> dict[str, LayerPair]:
    return {path: LayerPair(entry["wsp_us"], entry["bwsp_us"]) for path, entry in times.items()}
