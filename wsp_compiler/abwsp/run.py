"""A search from the model to the result: join the ranks, read the data, find or make the state, run the rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from wsp_compiler.abwsp.choices import Choices, LayerPair
from wsp_compiler.abwsp.finetuning import Finetune
from wsp_compiler.abwsp.outlook import Networks, dense_copy
from wsp_compiler.abwsp.prepare import Preparation
from wsp_compiler.abwsp.ranks import Ranks, join
from wsp_compiler.abwsp.result import SearchResult
from wsp_compiler.abwsp.rounds import Search
from wsp_compiler.abwsp.seeds import seeded
from wsp_compiler.abwsp.state import SearchState, StateFolder, digest
from wsp_compiler.activations import device_and_dtype, on_device
from wsp_compiler.batches import calibration_calls
from wsp_compiler.errors import ModelError
from wsp_compiler.evaluation import EvalFn, evaluate
from wsp_compiler.options import CompileOptions
from wsp_compiler.plan import PruningPlan
from wsp_compiler.progress import progress
from wsp_compiler.trace import Call, check_model

SAMPLES, ROUNDS = 50, 5
"""Candidates per round by default, and the paper's number of rounds."""
ALPHA = 30.0
"""The paper's percentage."""


@dataclass(frozen=True)
class Request:
    """The arguments of :func:`wsp_compiler.search`, checked; ``options`` holds those of compile.

    ``may_be_dense`` accepts that nothing is left to prune; else that is an error.
    """

    options: CompileOptions
    eval_fn: EvalFn
    calibration: Any
    alpha: float = ALPHA
    beta: int = ROUNDS
    samples: int = SAMPLES
    finetune: Finetune = None
    refit: str | bool = "layers"
    state: str | Path | None = None
    seed: int = 0
    example_inputs: Any = None
    target: Any = None
    times: Mapping[str, LayerPair] | None = None
    may_be_dense: bool = False

    def settings(self, model: nn.Module, calls: list[Call]) -> dict[str, Any]:
        """What decides the outcome, as JSON values: a state goes on only with the same."""
        options, finetune = self.options, self.finetune
        return {
            "model": digest(model), "pr": float(options.pr), "alpha": float(self.alpha), "samples": self.samples,
            "seed": self.seed, "refit": self.refit, "direction": options.direction, "tile": options.tile,
            "block": options.block, "importance": options.importance, "rules": repr(options.rules),
            "batches": len(calls), "finetune": _described(finetune),
        }  # fmt: skip


def searched_plan(
    model: nn.Module,
    options: CompileOptions,
    eval_fn: EvalFn | None,
    calibration: Any,
    example_inputs: Any,
    target: Any,
) -> PruningPlan | None:
    """What :func:`wsp_compiler.compile` uses for "abwsp" with data and eval_fn: a search without fine-tuning.

    None if the options ask for something else: another method, or ratios that are not the same in every layer.
    """
    uneven = (
        options.pr_scope == "global" or options.target_latency is not None or options.max_drop is not None
    )
    if options.method != "abwsp" or eval_fn is None or calibration is None or uneven:
        return None
    request = Request(
        options, eval_fn, calibration, example_inputs=example_inputs, target=target, may_be_dense=True
    )
    return run(model, request).plan


def run(model: nn.Module, request: Request) -> SearchResult:
    """Search; see :func:`wsp_compiler.search`.

    Raises:
        WspError: as there.
    """
    model = check_model(model)
    with join(device_and_dtype(model)[0]) as ranks:
        with seeded(request.seed, "calibration"):
            calls = calibration_calls(request.calibration, model, request.example_inputs)
        example = request.example_inputs
        if example is None:
            args, kwargs = calls[0]
            example = kwargs or args
        example = _on_device(example, model)
        settings = request.settings(model, calls)
        _check_equal(ranks, settings)
        networks = Networks.of(model, calls, request.eval_fn, example)
        folder = StateFolder(request.state)
        state = ranks.first(lambda: folder.load(settings))
        if state is None:
            state, choices = _begin(model, request, networks, settings, ranks, folder)
        else:
            plans = ranks.first(lambda: (folder.load_plan("wsp"), folder.load_plan("bwsp")))
            choices = Choices(*plans, state.times)
        steps = request.beta * (min(request.samples, 2 ** len(choices.layers)) + 1)
        with progress("search", steps, enabled=ranks.rank == 0) as advance:
            search = Search(
                networks, choices, request.alpha, request.beta, request.samples, request.finetune, request.refit,
                request.seed, ranks, state, folder, advance,
            )  # fmt: skip
            return search.run()


def _begin(
    model: nn.Module,
    request: Request,
    networks: Networks,
    settings: dict[str, Any],
    ranks: Ranks,
    folder: StateFolder,
) -> tuple[SearchState, Choices]:
    """The state of a new search, written, and its choices."""
    with seeded(request.seed, "dense"):
        dense = ranks.first(lambda: evaluate(request.eval_fn, dense_copy(model), "the dense model"))
    preparation = Preparation(
        model, request.options, networks.calls, networks.example_inputs, bool(request.refit), request.target,
        request.times,
    )  # fmt: skip
    choices = preparation.choices(ranks)
    if not choices.wsp and not choices.bwsp and not request.may_be_dense:
        reasons = "; ".join(f"{path}: {why}" for path, why in list(choices.wsp.left_alone.items())[:3])
        raise ModelError(
            f"no convolution is left to prune ({reasons or 'it has none'})",
            where="model",
            fix="see wsp_compiler.find_sites(model); keep_slower=True also prunes where dense is faster",
        )
    state = SearchState(settings, dict(choices.times), dense)
    if ranks.rank == 0:
        folder.save_plan("wsp", choices.wsp)
        folder.save_plan("bwsp", choices.bwsp)
        folder.save(state)
    return state, choices


def _described(finetune: Any) -> Any:
    """What the state says of ``finetune``: names and simple values."""
    if not isinstance(finetune, Mapping):
        return finetune is not None
    settings = cast("Mapping[str, Any]", finetune)
    return {name: value for name, value in settings.items() if isinstance(value, (int, float, str))}


def _check_equal(ranks: Ranks, settings: dict[str, Any]) -> None:
    """Raise :class:`ModelError` unless all ranks were given the same network and settings."""
    for rank, other in enumerate(ranks.all(lambda: settings)):
        names = [name for name in settings if settings[name] != other[name]]
        if names:
            raise ModelError(
                f"rank {ranks.rank} and rank {rank} differ in {', '.join(names)}",
                where="search",
                fix="load the same weights and give the same arguments in every process",
            )


def _on_device(example_inputs: Any, model: nn.Module) -> Any:
    device, dtype = device_and_dtype(model)
    (moved,), _ = on_device(((example_inputs,), {}), device, dtype)
    return moved
