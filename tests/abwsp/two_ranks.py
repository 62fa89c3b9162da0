"""What the processes of a distributed search do; started by torchrun, see test_ranks.py.

    torchrun --nproc-per-node=2 tests/abwsp/two_ranks.py OUTPUT_FOLDER [cuda]

Every rank writes rank-N.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import wsp_compiler
from tests.abwsp.problem import PR, Fidelity, batches, labelled, net, options


def error_of(run: Any) -> str:
    """Class and first line of the WspError that ``run()`` raises."""
    try:
        run()
    except wsp_compiler.errors.WspError as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "no error"


def main(folder: Path, kind: str) -> None:
    rank = int(os.environ["RANK"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device("cpu")
    torch.set_num_threads(1)
    dense = net()
    fidelity = Fidelity(dense)
    fidelity.x, fidelity.wanted = fidelity.x.to(device), fidelity.wanted.to(device)
    dense = dense.to(device)
    found: dict[str, Any] = {}

    # candidates spread over the ranks, in a process group that the search makes itself
    result = wsp_compiler.search(dense, PR, fidelity, batches(), **options(state=folder / "plain"))
    found["plain"] = {
        "winners": [entry.methods for entry in result.winners],
        "accuracies": [entry.accuracy for entry in result.winners],
        "outlooks": [entry.outlook for entry in result.candidates],
        "evaluated": fidelity.calls,
    }
    found["initialised"] = distributed.is_initialized()

    # both ways of fine-tuning, each rank with batches of its own
    seen: list[int] = []

    class Watched:
        def __iter__(self) -> Any:
            for index, batch in enumerate(labelled()):
                yield batch
                seen.append(index)

    steps: list[int] = []
    settings = {"data": Watched(), "steps": 4, "on_step": lambda step, loss, fraction: steps.append(step)}
    result = wsp_compiler.search(
        dense, PR, fidelity, batches(), **options(beta=1, finetune=settings, state=folder / "loop")
    )
    weights = torch.cat([parameter.detach().double().flatten() for parameter in result.model.parameters()])
    found["loop"] = {
        "steps": steps,
        "accuracy": result.best.accuracy,
        "checksum": float(weights.square().sum()),
    }
    found["state left by rank"] = (
        sorted(file.name for file in (folder / "loop").iterdir()) if rank == 0 else []
    )

    def train(module: nn.Module) -> nn.Module:
        found["wrapped"] = isinstance(module, DistributedDataParallel)
        module.train()
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
        x, y = (tensor.to(device) for tensor in labelled()[rank])
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x), y).backward()
            optimizer.step()
        return module

    result = wsp_compiler.search(
        dense, PR, fidelity, batches(), **options(beta=1, finetune=train, refit=False)
    )
    weights = torch.cat([tensor.detach().double().flatten() for tensor in result.model.state_dict().values()])
    found["function"] = {"accuracy": result.best.accuracy, "checksum": float(weights.square().sum())}

    # what fails on one rank fails on all
    def broken(module: nn.Module) -> float:
        if rank == 1:
            raise RuntimeError("no data here")
        return 1.0

    found["broken"] = error_of(lambda: wsp_compiler.search(dense, PR, broken, batches(), **options()))
    found["different"] = error_of(
        lambda: wsp_compiler.search(dense, 0.5 + 0.1 * rank, fidelity, batches(), **options())
    )
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "cpu")
