"""The one place that imports tvm: late, and with a faster import.

TVM with its LLVM takes seconds to import and 230 MB of memory. A process whose kernels are all cached needs neither, so
that ``tvm``, ``T`` and ``B`` are imported at their first use.

Parsing a TVMScript function calls ``inspect.stack()``, which scans all of ``sys.modules`` once per frame of
a frozen importer; answering those frames at once takes ``import tvm`` from many seconds to under two.
"""

from __future__ import annotations

import importlib
import inspect
from functools import cache
from types import ModuleType
from typing import Any

_original_getmodule = inspect.getmodule


def _getmodule(object: Any, _filename: str | None = None) -> ModuleType | None:
    if _filename is not None and _filename.startswith("<"):
        return None
    return _original_getmodule(object, _filename)


@cache
def _imported(name: str) -> Any:
    inspect.getmodule = _getmodule
    return importlib.import_module(name)


class Late:
    """Stands for a module, or for something in it, that is imported when it is first asked for anything."""

    def __init__(self, module: str, name: str = "") -> None:
        self._module, self._name = module, name

    def _get(self) -> Any:
        module = _imported(self._module)
        return getattr(module, self._name) if self._name else module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._get(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._get()(*args, **kwargs)


tvm: Any = Late("tvm")
T: Any = Late("tvm.script.tirx")
B: Any = Late("tvm.tirx.script.builder")
IRBuilder: Any = Late("tvm.script.ir_builder", "IRBuilder")

__all__ = ["B", "IRBuilder", "T", "tvm"]
