"""Criteria that score the units of a pattern. "l2" is the ABWSP paper's, "output" the default."""

from __future__ import annotations

from torch import Tensor

from wsp_compiler.pruning.base import Importance, over_units
from wsp_compiler.pruning.fpgm import fpgm
from wsp_compiler.pruning.l1 import l1
from wsp_compiler.pruning.output_aware import output_energy


def l2(U: Tensor, dims: tuple[int, ...]) -> Tensor:
    """L2 norm of every unit that spans ``dims`` of U [p*p, n, c]; those dims keep size 1."""
    return over_units(U.square(), dims).sqrt()


IMPORTANCES: dict[str, Importance] = {
    "output": output_energy,
    "l2": l2,
    "l1": l1,
    "fpgm": fpgm,
    "hrank": output_energy,  # until calibration has measured ranks (hrank.py), which weights do not tell
}
