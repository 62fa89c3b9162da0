"""Figures of the experiments as small PNGs. Needs matplotlib (pip install wsp_compiler[benchmarks]).

    python -m benchmarks.accuracy.figures all accuracy.json docs/figures
    python -m benchmarks.accuracy.figures front accuracy.json docs/figures --speed speed.json
    python -m benchmarks.accuracy.figures keep accuracy.json docs/figures --dense dense_resnet20_....pt

| figure | shows | of the ABWSP paper |
|---|---|---|
| methods | accuracy against pruning ratio, before and after fine-tuning | 7 |
| epochs | the same after few and many epochs | 11, 12 |
| outlook | outlook accuracy against fine-tuned accuracy | 6c |
| front | accuracy against measured speed | 7 |
| ablation | criterion, least squares, batch norm | - |
| tiles | F(2x2) against F(4x4) at equal multiplications | - |
| keep | what each pattern keeps of one layer | 13 |
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy.methods import METHODS, Variant, pruned, winograd_layers
from benchmarks.accuracy.models import make
from benchmarks.accuracy.saved import CLASSES
from benchmarks.accuracy.summary import Spread, correlations, dense_accuracy, good, spreads
from benchmarks.plots import COLOURS, save_figure
from benchmarks.results import Record, Row, load

NAMES = {"wsp": "WSP", "bwsp": "BWSP", "abwsp": "ABWSP", "fp": "FP", "wwp": "WWP"}
MADE_BY = dict(zip(NAMES, COLOURS, strict=False))
KEEP_PR, KEEP_LAYER = 0.5, "8.conv1"
"""Ratio of the keep pictures, as in the paper, and the layer of ResNet-20: 32 filters, 32 channels."""


def _line(axes: Any, points: Sequence[tuple[float, Spread]], **style: Any) -> None:
    """Means in percent with bars of one deviation."""
    found = sorted(points, key=lambda point: point[0])
    axes.errorbar(
        [x for x, _ in found], [100 * spread.mean for _, spread in found],
        yerr=[100 * spread.deviation for _, spread in found], marker="o", markersize=3, linewidth=1.2, capsize=2,
        **style,
    )  # fmt: skip


def _dense_line(axes: Any, rows: Sequence[Row], network: str) -> None:
    dense = dense_accuracy(rows).get(network)
    if dense is not None:
        axes.axhline(100 * dense.mean, color="black", linewidth=0.8, label="dense")


def _finish(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("pruning ratio")
    axes.set_ylabel("test accuracy, %")
    axes.legend(fontsize=7)


def _networks(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["network"] for row in rows))


def methods(panels: Callable[[int], Sequence[Any]], rows: Sequence[Row], _: Any) -> None:
    """One panel per network; dashed: batch norm re-estimated alone."""
    found = good(rows, "methods")
    networks = _networks(found)
    for axes, network in zip(panels(len(networks)), networks, strict=True):
        some = [row for row in found if row["network"] == network]
        for value, style in (("accuracy", "-"), ("outlook_test", "--")):
            groups = spreads(some, value, "method", "pr")
            for method in dict.fromkeys(str(key[0]) for key in groups):
                points = [(float(str(key[1])), spread) for key, spread in groups.items() if key[0] == method]
                label = NAMES[method] if style == "-" else None
                _line(axes, points, color=MADE_BY[method], linestyle=style, label=label)
        _dense_line(axes, rows, network)
        _finish(axes, f"{network} (dashed: before fine-tuning)")


def epochs(panels: Callable[[int], Sequence[Any]], rows: Sequence[Row], _: Any) -> None:
    """One panel per network and number of epochs."""
    found = good(rows, "epochs")
    pairs = sorted({(row["network"], row["epochs"]) for row in found})
    for axes, (network, count) in zip(panels(len(pairs)), pairs, strict=True):
        some = [row for row in found if (row["network"], row["epochs"]) == (network, count)]
        for method in dict.fromkeys(row["method"] for row in some):
            groups = spreads([row for row in some if row["method"] == method], "accuracy", "pr")
            points = [(float(str(key[0])), spread) for key, spread in groups.items()]
            _line(axes, points, color=MADE_BY[method], label=NAMES[method])
        _dense_line(axes, rows, network)
        _finish(axes, f"{network}, {count} epoch{'s' * (count > 1)} of fine-tuning")


def outlook(panels: Callable[[int], Sequence[Any]], rows: Sequence[Row], _: Any) -> None:
    """A point a candidate."""
    rho = correlations(rows)
    for axes, experiment in zip(panels(len(rho)), rho, strict=True):
        found = good(rows, experiment)
        x, y = ([100 * row[name] for row in found] for name in ("outlook", "accuracy"))
        axes.scatter(x, y, s=12, color=COLOURS[0])
        what = "one ratio, WSP or BWSP" if experiment == "outlook" else "uneven ratios, WSP or BWSP"
        axes.set_title(
            f"{what}: Spearman's rho {rho[experiment][0]:.2f}, {len(found)} candidates", fontsize=8
        )
        axes.set_xlabel("outlook accuracy (validation), %")
        axes.set_ylabel("fine-tuned accuracy (test), %")


def front(panels: Callable[[int], Sequence[Any]], rows: Sequence[Row], given: argparse.Namespace) -> None:
    """Accuracy against speedup over dense Winograd and over the best dense runtime."""
    if given.speed is None:
        raise ValueError("the figure 'front' needs --speed, the record of benchmarks.accuracy.speed")
    times = {row["name"]: row for row in load(given.speed).rows if not row["failure"]}
    found = [row for row in good(rows, "methods") if row["name"] in times]
    kinds = (("strongest_ratio", "the best dense runtime"), ("winograd_ratio", "dense Winograd"))
    for axes, (key, what) in zip(panels(2), kinds, strict=True):
        for method in dict.fromkeys(row["method"] for row in found):
            points = sorted(
                (times[row["name"]][key], 100 * row["accuracy"]) for row in found if row["method"] == method
            )
            axes.plot(
                *zip(*points, strict=True),
                marker="o",
                markersize=3,
                label=NAMES[method],
                color=MADE_BY[method],
            )
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_xlabel(f"speedup over {what}")
        axes.set_ylabel("test accuracy, %")
        axes.legend(fontsize=7)


def ablation(panels: Callable[[int], Sequence[Any]], rows: Sequence[Row], _: Any) -> None:
    """Accuracy at each stage before fine-tuning, and after it."""
    found = good(rows, "ablation")
    stages = {
        ("l2", False, "one_shot"): "L2",
        ("output", False, "one_shot"): "output-aware",
        ("output", True, "one_shot"): "+ calibration, least squares",
        ("output", True, "outlook_test"): "+ batch norm",
        ("l2", False, "accuracy"): "L2, fine-tuned",
        ("output", True, "accuracy"): "calibrated, fine-tuned",
    }
    (axes,) = panels(min(1, len(found)))
    for index, ((importance, calibrated, value), label) in enumerate(stages.items()):
        some = [row for row in found if (row["importance"], row["calibrated"]) == (importance, calibrated)]
        groups = spreads(some, value, "pr")
        points = [(float(str(key[0])), spread) for key, spread in groups.items()]
        _line(
            axes,
            points,
            color=COLOURS[index % len(COLOURS)],
            label=label,
            linestyle="--" if index > 3 else "-",
        )
    _finish(axes, "what each step brings (WSP)")


def tiles(panels: Callable[[int], Sequence[Any]], rows: Sequence[Row], _: Any) -> None:
    """Accuracy against the multiplications that are left."""
    found = good(rows, "tiles")
    left = {2: 4 / 9, 4: 1 / 4}
    (axes,) = panels(min(1, len(found)))
    for index, tile in enumerate(left):
        for value, style in (("accuracy", "-"), ("one_shot", "--")):
            points = sorted(
                (left[tile] * (1 - row["pr"]), 100 * row[value]) for row in found if row["tile"] == tile
            )
            label = f"F({tile}x{tile}), " + ("fine-tuned" if style == "-" else "calibrated")
            axes.plot(
                *zip(*points, strict=True), style, marker="o", markersize=3, color=COLOURS[index], label=label
            )
    _finish(axes, "two tiles at equal multiplications (WSP)")
    axes.set_xlabel("multiplications left, of the direct convolution's")
    axes.set_xscale("log")


def keep_image(weight: Tensor) -> Tensor:
    """Signs as a picture, [rows, columns] in {-1, 0, 1}: the p*p matrices U_k [n, c] side by side, p in a row."""
    side = round(len(weight) ** 0.5)
    n, c = weight.shape[1:]
    bordered = torch.full((len(weight), n + 1, c + 1), float("nan"))
    bordered[:, :n, :c] = torch.sign(weight.detach().cpu())
    rows = bordered.view(side, side, n + 1, c + 1).permute(0, 2, 1, 3)
    return rows.reshape(side * (n + 1), side * (c + 1))


def keep(panels: Callable[[int], Sequence[Any]], rows: Sequence[Row], given: argparse.Namespace) -> None:
    """Positive, negative and pruned weights of one layer, under every pattern."""
    if given.dense is None:
        raise ValueError("the figure 'keep' needs --dense, the weights of a dense ResNet-20")
    from matplotlib.colors import ListedColormap

    model = make("resnet20", CLASSES)
    model.load_state_dict(torch.load(given.dense, map_location="cpu", weights_only=True))
    colours = ListedColormap(["#d9a441", "#e6efe6", "#1b6ca8"])
    for axes, method in zip(panels(len(METHODS)), METHODS, strict=True):
        layer = winograd_layers(pruned(model, Variant(method), KEEP_PR, []))[KEEP_LAYER]
        picture = keep_image(layer.winograd_weight()).numpy()
        axes.imshow(picture, cmap=colours, vmin=-1, vmax=1, interpolation="nearest")
        axes.set_title(f"{NAMES[method]}, pr={KEEP_PR:g}", fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])


FIGURES: dict[str, Callable[..., None]] = {
    "methods": methods, "epochs": epochs, "outlook": outlook, "ablation": ablation, "tiles": tiles,
    "front": front, "keep": keep,
}  # fmt: skip


def draw(kind: str, record: Record, path: Path, given: argparse.Namespace) -> None:
    """Writes one figure as a PNG of at most 150 kB.

    Raises:
        ValueError: nothing to draw, or the picture is too large.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(layout="constrained")

    def panels(count: int) -> Sequence[Any]:
        if count == 0:
            raise ValueError(f"the record has no rows for the figure {kind!r}")
        lines = -(-count // 3)
        columns = -(-count // lines)
        figure.set_size_inches(4.2 * columns if count > 1 else 5.5, 3.4 * lines)
        found = list(figure.subplots(lines, columns, squeeze=False).flat)
        for unused in found[count:]:
            unused.set_axis_off()
        return found[:count]

    try:
        FIGURES[kind](panels, record.rows, given)
        figure.suptitle(f"{record.environment['device']}, commit {record.commit[:12]}", fontsize=7)
        save_figure(figure, path, dpi=100)
    finally:
        pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; with "all", figures that the record has nothing for are left out, and named."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.figures", description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("kind", choices=("all", *FIGURES))
    made.add_argument("record", type=Path, help="JSON that benchmarks.accuracy.run wrote")
    made.add_argument("folder", type=Path, help="for accuracy_KIND.png")
    made.add_argument("--speed", type=Path, help="record of benchmarks.accuracy.speed, for the front")
    made.add_argument("--dense", type=Path, help="weights of a dense ResNet-20, for the keep pictures")
    given = made.parse_args(arguments)
    record = load(given.record)
    for kind in FIGURES if given.kind == "all" else (given.kind,):
        path = given.folder / f"accuracy_{kind}.png"
        try:
            draw(kind, record, path, given)
            print(f"wrote {path}")
        except (OSError, ValueError, ImportError) as problem:
            if given.kind != "all":
                made.error(str(problem))
            print(f"no {kind}: {problem}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
