"""Packed weights, made once per convolution: kernels for several image sizes and epilogues share them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

from wsp_compiler.ops import WinogradSite

Weights = TypeVar("Weights")
_packed: WeakKeyDictionary[WinogradSite, dict[Hashable, Any]] = WeakKeyDictionary()


def packed(site: WinogradSite, key: Hashable, pack: Callable[[], Weights]) -> Weights:
    """``pack()``, or what it returned before for this site and key; kept while the site lives.

    Args:
        site: whose weights are packed; they do not change once a model is compiled.
        key: all that ``pack`` depends on besides the site.
        pack: makes the packed weights.
    """
    known = _packed.setdefault(site, {})
    if key not in known:
        known[key] = pack()
    return cast("Weights", known[key])
