"""The one place that imports tvm: with a faster import.

Parsing a TVMScript function calls ``inspect.stack()``, which scans all of ``sys.modules`` once per frame of
a frozen importer; answering those frames at once takes ``import tvm`` from many seconds to under two.
"""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType
from typing import Any

_original_getmodule = inspect.getmodule


def _getmodule(object: Any, _filename: str | None = None) -> ModuleType | None:
    if _filename is not None and _filename.startswith("<"):
        return None
    return _original_getmodule(object, _filename)


inspect.getmodule = _getmodule
tvm: Any = importlib.import_module("tvm")
T: Any = importlib.import_module("tvm.script.tirx")

__all__ = ["T", "tvm"]
