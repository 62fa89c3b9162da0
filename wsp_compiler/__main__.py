"""The command line.

    python -m wsp_compiler inspect torchvision:resnet18
    python -m wsp_compiler compile torchvision:resnet18 --pr 0.8 --report

A model is named ``torchvision:NAME``, or ``package.module:callable`` for a function or class that is called
without arguments. Mistakes are reported in one message on stderr with exit code 2.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import json
import os
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wsp_compiler import api
from wsp_compiler.errors import OptionError, WspError
from wsp_compiler.options import DIRECTIONS, METHOD_CHOICES, PRECISIONS, PruneRule
from wsp_compiler.report import format_table
from wsp_compiler.sites import find_sites


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=5, cutoff=0.5)
    return f"near names: {', '.join(near)}" if near else "check the name"


def _torchvision_model(name: str) -> nn.Module:
    from torchvision import models

    if name not in models.list_models():
        fix = _near(name, models.list_models())
        raise OptionError(f"torchvision has no model {name!r}", where="model", fix=fix)
    builder = models.get_model_builder(name)
    keywords: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        keywords["weights_backbone"] = None  # nothing is downloaded
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about how future releases initialise weights
        return builder(**keywords)


def load_model(spec: str) -> nn.Module:
    """The model that ``spec`` names, in eval mode, with random weights.

    Raises:
        OptionError: there is no such model, or making it fails.
    """
    module_name, colon, name = spec.rpartition(":")
    if not colon:
        fix = "write torchvision:NAME or package.module:callable"
        raise OptionError(f"{spec!r} names no model", where="model", fix=fix)
    if module_name == "torchvision":
        return _torchvision_model(name).eval()
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module's own code runs
        what = f"cannot import {module_name!r} ({type(error).__name__}: {error})"
        raise OptionError(what, where="model", fix="check the name and the module") from error
    if not callable(getattr(module, name, None)):
        fix = _near(name, dir(module))
        raise OptionError(f"{module_name} has no callable {name!r}", where="model", fix=fix)
    fix = "name something that returns a torch.nn.Module when called without arguments"
    try:
        model = getattr(module, name)()
    except Exception as error:
        what = f"{spec}() failed with {type(error).__name__}: {error}"
        raise OptionError(what, where="model", fix=fix) from error
    if not isinstance(model, nn.Module):
        raise OptionError(f"{spec}() returned a {type(model).__name__}", where="model", fix=fix)
    return model.eval()


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill ``model`` from a safetensors file or a torch state_dict.

    Raises:
        OptionError: the file cannot be read, or does not fit.
    """
    try:
        if path.suffix == ".safetensors":
            state: Any = importlib.import_module("safetensors.torch").load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state.get("state_dict", state))
    except Exception as error:  # each format has its own
        message = " ".join(str(error).split())[:400]
        what = f"cannot load {path} ({type(error).__name__}: {message})"
        fix = "give a .safetensors file or a torch state_dict of this model"
        raise OptionError(what, where="--weights", fix=fix) from error


def _flag(value: str) -> bool:
    return {"": True, "true": True, "false": False}[value.lower()]


def tile_choice(text: str) -> int | str:
    """ "auto", or a number."""
    return text if text == "auto" else int(text)


RULE_VALUES: dict[str, Any] = {
    "method": str,
    "direction": str,
    "pr": float,
    "tile": tile_choice,
    "block": int,
    "skip": _flag,
}


def parse_rule(text: str) -> PruneRule:
    """The rule of ``REGEX:key=value,...``; the last colon separates, ``skip`` needs no value.

    Raises:
        OptionError: malformed. RuleError, OptionError: as PruneRule.
    """
    match, _, settings = text.rpartition(":")
    values: dict[str, Any] = {}
    for setting in settings.split(","):
        key, _, value = setting.strip().partition("=")
        try:
            values[key] = RULE_VALUES[key](value)
        except (KeyError, ValueError) as error:
            keys = ", ".join(RULE_VALUES)
            fix = f"write 'REGEX:key=value,...' with keys {keys}, for example 'layer1.*:pr=0.5,tile=4'"
            raise OptionError(f"malformed rule {text!r} at {setting!r}", where="--rule", fix=fix) from error
    return PruneRule(match, **values)


def parse_shape(text: str) -> tuple[int, ...]:
    """``1,3,224,224`` as a tuple of sizes."""
    if not all(size.strip().isdigit() for size in text.split(",")):
        raise OptionError(f"malformed shape {text!r}", where="--shape", fix="write sizes as in 1,3,224,224")
    return tuple(int(size) for size in text.split(","))


def parse_target(text: str | None) -> Any:
    """A device, or a TVM target as JSON."""
    try:
        return json.loads(text) if text is not None and text.startswith("{") else text
    except ValueError as error:
        fix = """write '{"kind": "llvm", "mcpu": "x86-64-v3"}'"""
        raise OptionError(f"malformed JSON ({error})", where="--target", fix=fix) from error


def run_inspect(arguments: argparse.Namespace) -> None:
    """Print every convolution and whether it is eligible."""
    example = None if arguments.shape is None else torch.randn(parse_shape(arguments.shape))
    sites = find_sites(load_model(arguments.model), example)
    rows: list[tuple[str, ...]] = []
    for site in sites:
        inputs = " ".join("x".join(map(str, shape)) for shape in site.input_shapes) or "?"
        weight = "x".join(map(str, (site.filters, site.channels, *site.kernel)))
        rows.append((site.path, weight, inputs, site.reject or "eligible"))
    eligible = sum(site.reject is None for site in sites)
    print(format_table(("path", "weight", "input", "verdict"), rows))
    print(f"\n{eligible} of {len(sites)} convolutions are eligible")


def run_compile(arguments: argparse.Namespace) -> None:
    """Compile a model, run it once, and say what became of it."""
    names = ("method", "direction", "tile", "block", "precision", "check", "keep_slower", "tune")
    names += ("pr_scope", "target_latency", "importance")
    options: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    options["rules"] = [parse_rule(text) for text in arguments.rule]
    options["target"], shape = parse_target(arguments.target), parse_shape(arguments.shape)
    model = load_model(arguments.model)
    if arguments.weights is not None:
        load_weights(model, arguments.weights)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    compiled = api.compile(model, arguments.pr, example_inputs=x, **options)
    built = time.perf_counter()
    compiled(x.to(compiled.target.device))
    if compiled.target.is_cuda:
        torch.cuda.synchronize(compiled.target.device)
    call, target, plan = time.perf_counter() - built, compiled.target, compiled.plan
    if arguments.report:
        print(compiled.report() + "\n")
    total = len(compiled.record.sites)
    print(f"{arguments.model}: {len(plan)} of {total} convolutions run as Winograd")
    print(f"compiled for {target.device} ({target.arch}) in {built - start:.1f} s")
    print(f"a call on {list(shape)} took {1000 * call:.1f} ms")
    if arguments.plan is not None:
        try:
            arguments.plan.write_text(plan.to_json(), encoding="utf-8")
        except OSError as error:
            raise OptionError(
                f"cannot write it ({error})", where="--plan", fix="name another file"
            ) from error
        print(f"plan written to {arguments.plan}")


def make_parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    parser = argparse.ArgumentParser(prog="python -m wsp_compiler", description="Winograd-pruning compiler")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    look = commands.add_parser("inspect", help="list the convolutions and which are eligible")
    look.add_argument("--shape", help="input shape, for example 1,3,224,224")
    look.set_defaults(run=run_inspect)
    make = commands.add_parser("compile", help="prune, compile and run once")
    make.add_argument("--pr", type=float, default=0.8, help="share of weights to remove (default 0.8)")
    make.add_argument("--method", default="abwsp", help=f"{', '.join(METHOD_CHOICES)} (default abwsp)")
    make.add_argument("--direction", default="row", help=", ".join(DIRECTIONS))
    make.add_argument(
        "--importance",
        default="output",
        help="criterion: output (default), l2, l1 or fpgm (hrank needs data)",
    )
    make.add_argument(
        "--tile", type=tile_choice, default=2, help="output tile side: 2, 4 or auto (the faster)"
    )
    make.add_argument("--block", type=int, help="bwsp: balance groups of so many filters; by default fitting")
    make.add_argument("--precision", help=f"{', '.join(PRECISIONS)}; by default the model's")
    make.add_argument("--target", help="cpu, cuda, cuda:N, or a TVM target as JSON; by default cpu")
    make.add_argument("--rule", action="append", default=[], metavar="REGEX:KEY=VALUE,...", help="repeatable")
    make.add_argument("--shape", default="1,3,224,224", help="input shape (default 1,3,224,224)")
    make.add_argument("--weights", type=Path, metavar="FILE", help="safetensors or torch state_dict")
    make.add_argument("--report", action="store_true", help="print the table of all convolutions")
    make.add_argument("--plan", type=Path, metavar="FILE", help="write the pruning plan as JSON")
    make.add_argument("--keep-slower", action="store_true", help="lower layers also where dense is faster")
    make.add_argument("--pr-scope", help="global: --pr over all layers together; layer (default): in each")
    make.add_argument(
        "--target-latency", type=float, metavar="MS", help="prune until a call takes that long; see --tune"
    )
    make.add_argument("--tune", default="off", help="what to measure: off, fast (seconds a layer) or full")
    make.add_argument("--check", action="store_true", help="verify every pass in float64")
    make.set_defaults(run=run_compile)
    for command in (look, make):
        command.add_argument("model", help="torchvision:NAME or package.module:callable")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = make_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except WspError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
