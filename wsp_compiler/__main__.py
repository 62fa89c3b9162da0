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
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wsp_compiler import api
from wsp_compiler.errors import OptionError, WspError
from wsp_compiler.options import DIRECTIONS, METHODS, PRECISIONS, PruneRule
from wsp_compiler.report import format_table
from wsp_compiler.sites import find_sites

RULE_KEYS = ("method", "direction", "pr", "tile", "skip")


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=5, cutoff=0.5)
    return f"near names: {', '.join(near)}" if near else "check the name"


def load_model(spec: str) -> nn.Module:
    """The model that ``spec`` names, in eval mode, with random weights.

    Raises:
        OptionError: there is no such model, or making it fails.
    """
    module_name, colon, name = spec.rpartition(":")
    if not colon:
        raise OptionError(
            f"{spec!r} names no model", where="model", fix="torchvision:NAME or package.module:callable"
        )
    if module_name == "torchvision":
        from torchvision import models

        if name not in models.list_models():
            raise OptionError(
                f"torchvision has no model {name!r}", where="model", fix=_near(name, models.list_models())
            )
        builder = models.get_model_builder(name)
        keywords: dict[str, Any] = {"weights": None}
        if "weights_backbone" in inspect.signature(builder).parameters:
            keywords["weights_backbone"] = None  # nothing is downloaded
        return builder(**keywords).eval()
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise OptionError(
            f"cannot import {module_name!r} ({error})", where="model", fix="check the name"
        ) from error
    if not callable(getattr(module, name, None)):
        raise OptionError(
            f"{module_name} has no callable {name!r}", where="model", fix=_near(name, dir(module))
        )
    try:
        model = getattr(module, name)()
    except Exception as error:
        what = f"{spec}() failed with {type(error).__name__}: {error}"
        raise OptionError(
            what, where="model", fix="name something that makes a model without arguments"
        ) from error
    if not isinstance(model, nn.Module):
        what = f"{spec}() returned a {type(model).__name__}"
        raise OptionError(what, where="model", fix="it has to return a torch.nn.Module")
    return model.eval()


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill ``model`` from a safetensors file or a torch state_dict.

    Raises:
        OptionError: the file cannot be read, or does not fit.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state.get("state_dict", state))
    except Exception as error:  # every library has its own
        message = " ".join(str(error).split())[:400]
        raise OptionError(
            f"cannot load {path} ({type(error).__name__}: {message})",
            where="--weights",
            fix="give a .safetensors file or a torch state_dict of this model",
        ) from error


def parse_rule(text: str) -> PruneRule:
    """The rule of ``REGEX:key=value,...``; the last colon separates.

    Raises:
        OptionError: malformed. RuleError, OptionError: as PruneRule.
    """
    match, colon, settings = text.rpartition(":")
    values: dict[str, Any] = {}
    for setting in settings.split(","):
        key, equals, value = setting.strip().partition("=")
        if not colon or key not in RULE_KEYS or (not equals and key != "skip"):
            fix = (
                f"write 'REGEX:key=value,...' with keys {', '.join(RULE_KEYS)}, for example 'layer1.*:pr=0.5'"
            )
            raise OptionError(f"malformed rule {text!r} at {setting!r}", where="--rule", fix=fix)
        try:
            values[key] = {"pr": float, "tile": int, "skip": _flag}.get(key, str)(value)
        except ValueError as error:
            raise OptionError(
                f"{key}={value!r}: {error}", where=f"--rule {text!r}", fix="give a number"
            ) from error
    return PruneRule(match, **values)


def _flag(value: str) -> bool:
    if value.lower() in ("", "true", "1"):
        return True
    if value.lower() in ("false", "0"):
        return False
    raise ValueError("not true or false")


def parse_shape(text: str) -> tuple[int, ...]:
    """``1,3,224,224`` as a tuple of sizes."""
    try:
        shape = tuple(int(size) for size in text.replace("x", ",").split(","))
    except ValueError:
        shape = (-1,)
    if min(shape) < 0:
        raise OptionError(f"malformed shape {text!r}", where="--shape", fix="write sizes as in 1,3,224,224")
    return shape


def parse_target(text: str | None) -> Any:
    """A device, or a TVM target as JSON."""
    if text is None or not text.startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        fix = """write '{"kind": "llvm", "mcpu": "x86-64-v3"}'"""
        raise OptionError(f"malformed JSON ({error})", where="--target", fix=fix) from error


def run_inspect(arguments: argparse.Namespace) -> None:
    """Print every convolution and whether it is eligible."""
    model = load_model(arguments.model)
    example = None if arguments.shape is None else torch.randn(parse_shape(arguments.shape))
    sites = find_sites(model, example)
    rows: list[tuple[str, ...]] = []
    for site in sites:
        inputs = " ".join("x".join(map(str, shape)) for shape in site.input_shapes) or "?"
        filters = f"{site.filters}x{site.channels}x{'x'.join(map(str, site.kernel))}"
        rows.append((site.path, filters, inputs, site.reject or "eligible"))
    print(format_table(("path", "weight", "input", "verdict"), rows) if rows else "no convolutions")
    eligible = sum(site.reject is None for site in sites)
    print(f"\n{eligible} of {len(sites)} convolutions are eligible")


def run_compile(arguments: argparse.Namespace) -> None:
    """Compile a model, run it once, and say what became of it."""
    rules = [parse_rule(text) for text in arguments.rule]
    target, shape = parse_target(arguments.target), parse_shape(arguments.shape)
    model = load_model(arguments.model)
    if arguments.weights is not None:
        load_weights(model, arguments.weights)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    compiled = api.compile(
        model,
        arguments.pr,
        example_inputs=x,
        method=arguments.method,
        direction=arguments.direction,
        tile=arguments.tile,
        rules=rules,
        precision=arguments.precision,
        target=target,
        check=arguments.check,
    )
    built = time.perf_counter()
    compiled(x.to(compiled.target.device))
    if compiled.target.is_cuda:
        torch.cuda.synchronize(compiled.target.device)
    call = time.perf_counter() - built
    if arguments.report:
        print(compiled.report() + "\n")
    where = f"{compiled.target.device} ({compiled.target.arch})"
    print(
        f"{arguments.model}: {len(compiled.plan)} of {len(compiled.record.sites)} convolutions run as Winograd"
    )
    print(f"compiled for {where} in {built - start:.1f} s; a call on {list(shape)} took {1000 * call:.1f} ms")
    if arguments.plan is not None:
        try:
            arguments.plan.write_text(compiled.plan.to_json(), encoding="utf-8")
        except OSError as error:
            raise OptionError(
                f"cannot write it ({error})", where="--plan", fix="name another file"
            ) from error
        print(f"plan written to {arguments.plan}")


def make_parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    parser = argparse.ArgumentParser(
        prog="python -m wsp_compiler", description="Winograd-structured pruning compiler"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    model_help = "torchvision:NAME or package.module:callable"
    looking = commands.add_parser("inspect", help="list the convolutions and which are eligible")
    looking.add_argument("model", help=model_help)
    looking.add_argument("--shape", help="input shape, for example 1,3,224,224")
    looking.set_defaults(run=run_inspect)
    making = commands.add_parser("compile", help="prune, compile and run once")
    making.add_argument("model", help=model_help)
    making.add_argument(
        "--pr", type=float, default=0.8, help="share of Winograd weights to remove (default 0.8)"
    )
    making.add_argument("--method", default="bwsp", help=", ".join(METHODS))
    making.add_argument("--direction", default="row", help=", ".join(DIRECTIONS))
    making.add_argument("--tile", type=int, default=2, help="output tile side, 2 or 4")
    making.add_argument("--precision", help=f"{', '.join(PRECISIONS)}; by default the model's")
    making.add_argument("--target", help="cpu, cuda, cuda:N, or a TVM target as JSON; by default cpu")
    making.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="REGEX:KEY=VALUE,...",
        help="repeatable; first match wins",
    )
    making.add_argument("--shape", default="1,3,224,224", help="input shape (default 1,3,224,224)")
    making.add_argument("--weights", type=Path, metavar="FILE", help="safetensors or torch state_dict")
    making.add_argument("--report", action="store_true", help="print the table of all convolutions")
    making.add_argument("--plan", type=Path, metavar="FILE", help="write the pruning plan as JSON")
    making.add_argument("--check", action="store_true", help="verify every pass in float64")
    making.set_defaults(run=run_compile)
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
