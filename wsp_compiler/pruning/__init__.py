"""Pruning patterns as pure tensor functions: Winograd weights in, ``keep`` out. No fx here.

A pattern is one file with one class and one entry in :data:`PATTERNS`.
"""

from __future__ import annotations

from wsp_compiler.pruning.balanced import BalancedWinogradStructured
from wsp_compiler.pruning.base import Pattern
from wsp_compiler.pruning.dense import Dense
from wsp_compiler.pruning.elements import WinogradWeights
from wsp_compiler.pruning.filters import Filters
from wsp_compiler.pruning.importance import IMPORTANCES
from wsp_compiler.pruning.structured import WinogradStructured

PATTERNS: dict[str, Pattern] = {
    "dense": Dense(),
    "fp": Filters(),
    "wwp": WinogradWeights(),
    "wsp": WinogradStructured(),
    "bwsp": BalancedWinogradStructured(),
}

__all__ = ["IMPORTANCES", "PATTERNS", "Pattern"]
