"""How much outlook accuracy says of accuracy after fine-tuning, for the ways to refit that `wsp_compiler.search` has.

    python -m benchmarks.outlook_refit --json benchmarks/results/outlook_refit_cpu.json

A network of eight convolutions is trained on scikit-learn's digits (noisy, enlarged to 16x16). Random assignments of
WSP or BWSP to its layers are judged in three ways, then refitted and fine-tuned alike. Rows: one per assignment, then
Spearman's rho for each way. Accuracies are shares of 450 validation images.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import wsp_compiler
from benchmarks.results import Row, new_record
from wsp_compiler.abwsp.choices import Choices
from wsp_compiler.abwsp.outlook import Networks
from wsp_compiler.abwsp.prepare import Preparation
from wsp_compiler.abwsp.ranks import Ranks
from wsp_compiler.abwsp.sampling import draw
from wsp_compiler.batches import calibration_calls
from wsp_compiler.options import CompileOptions

WIDTHS = (24, 24, 24, 24, 32, 32, 32, 32)
WAYS = {"paper": ("l2", False), "layers": ("output", False), "candidates": ("output", True)}
"""Name -> (importance, whether each candidate is refitted as the network that it is)."""
Batches = list[tuple[Tensor, Tensor]]


class Net(nn.Module):
    """Eight 3x3 convolutions with batch norm, and a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        pairs = list(zip((1, *WIDTHS[:-1]), WIDTHS, strict=True))
        self.convs = nn.ModuleList(nn.Conv2d(c, n, 3, padding=1, bias=False) for c, n in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in WIDTHS)
        self.classifier = nn.Linear(WIDTHS[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.relu(norm(conv(x)))
            if index == 4:
                x = F.max_pool2d(x, 2)
        return self.classifier(x.mean((2, 3)))


def digits() -> tuple[Batches, Batches]:
    """Training (900 images) and validation (450), in batches."""
    found = load_digits()
    x = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16 - 0.3
    x = F.interpolate(x, size=(16, 16), mode="bilinear") + 0.25 * torch.randn(len(x), 1, 16, 16)
    order = torch.randperm(len(x))
    x, y = x[order], torch.tensor(found.target)[order]
    train = list(zip(x[:900].split(64), y[:900].split(64), strict=True))
    return train, list(zip(x[900:1350].split(150), y[900:1350].split(150), strict=True))


def train_dense(batches: Batches, epochs: int) -> nn.Module:
    """The network, trained with Adam; in eval mode."""
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(epochs):
        for x, y in random.sample(batches, len(batches)):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


def accuracy(model: nn.Module, batches: Batches) -> float:
    """Share of right answers."""
    with torch.no_grad():
        return sum(int((model(x).argmax(1) == y).sum()) for x, y in batches) / sum(len(y) for _, y in batches)


def prepared(model: nn.Module, pr: float, images: list[Tensor]) -> tuple[Networks, dict[str, Choices]]:
    """Both plans for each way to judge, and what judges them."""
    calls = calibration_calls(images, model)
    networks = Networks.of(model, calls, lambda module: 0.0, images[0])
    choices: dict[str, Choices] = {}
    for way, (importance, _) in WAYS.items():
        options = CompileOptions(pr, "wsp", importance=importance)
        preparation = Preparation(model, options, calls, images[0], importance == "output", None, {})
        choices[way] = preparation.choices(Ranks())
    return networks, choices


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.outlook_refit", description=__doc__)
    parser.add_argument("--pr", type=float, default=0.75)
    parser.add_argument("--assignments", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=12, help="of the dense network")
    parser.add_argument("--steps", type=int, default=60, help="of each fine-tuning")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Judge, fine-tune, correlate; the record is written after every assignment."""
    options = parse(arguments)
    given = list(sys.argv[1:] if arguments is None else arguments)
    torch.manual_seed(options.seed)
    random.seed(options.seed)
    train, validation = digits()
    model = train_dense(train, options.epochs)
    networks, choices = prepared(model, options.pr, [x for x, _ in train[:3]])
    record = new_record("benchmarks.outlook_refit", given, "cpu")
    rows: list[Row] = []
    layers = len(choices["layers"].layers)
    for name in draw(layers, options.assignments, options.seed, 0, ()):
        row: Row = {"assignment": name, "dense": accuracy(model, validation), "pr": options.pr}
        for way, (_, own) in WAYS.items():
            plan = choices[way].plan(name)
            module = networks.build(networks.refitted(plan)) if own else networks.adapted(plan)[1]
            row[way] = accuracy(module, validation)
        module = networks.build(networks.refitted(choices["layers"].plan(name)))
        torch.manual_seed(options.seed)
        wsp_compiler.finetune(module, train, steps=options.steps, learning_rate=1e-3)
        row["fine_tuned"] = accuracy(module, validation)
        print(row, flush=True)
        rows.append(row)
        record.rows = rows
        record.save(options.json)
    tuned = [row["fine_tuned"] for row in rows]
    rho = {way: wsp_compiler.spearman([row[way] for row in rows], tuned) for way in WAYS}
    record.rows = [*rows, {"spearman": rho, "assignments": len(rows)}]
    record.save(options.json)
    print(rho)


if __name__ == "__main__":
    main()
