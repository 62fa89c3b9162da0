"""The dense and the pruned network on the calibration inputs: what their modules receive and return.

:class:`Replay` works for any model: it runs the network from its beginning for every module asked for and keeps
nothing between batches, which costs half a forward pass each time. :class:`wsp_compiler.frontier.Frontier` is for
models that are one graph: it goes on from where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from wsp_compiler.clone import clone_module, named_modules
from wsp_compiler.errors import InputError
from wsp_compiler.plan import PruningPlan
from wsp_compiler.trace import Call


class Networks(Protocol):
    """Two clones over the user's tensors, the dense network and the one that is being pruned, and their inputs."""

    @property
    def batches(self) -> int:
        """Number of calls held."""
        ...

    def module(self, path: str, *, pruned: bool) -> nn.Module:
        """A module of one of the clones; what is written to its ``__dict__`` or buffers changes that clone only."""
        ...

    def order(self, plan: PruningPlan) -> list[tuple[str, bool]]:
        """(path, whether it is a convolution) of pruned convolutions and batch norms, by first call.

        Left out are batch norms before the first pruned convolution and those right behind one.
        """
        ...

    def capture(self, path: str, index: int, *, pruned: bool, output: bool) -> Tensor:
        """What the module at ``path`` receives (or returns) first on batch ``index``: finite, [N, c, H, W]."""
        ...

    def finish(self, path: str, index: int, value: Tensor, *, pruned: bool) -> Any:
        """What the network returns on batch ``index`` if the first call of ``path`` returns ``value``."""
        ...


def device_and_dtype(model: nn.Module) -> tuple[torch.device, torch.dtype | None]:
    """Where ``model`` runs and in which floating-point type; (cpu, None) without tensors."""
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    return (tensors[0].device, tensors[0].dtype) if tensors else (torch.device("cpu"), None)


def is_fitted(path: str, module: nn.Module, plan: PruningPlan) -> bool:
    """True for pruned convolutions and for batch norms with statistics."""
    if isinstance(module, nn.Conv2d):
        return path in plan and plan[path].kept_fraction < 1
    return type(module) is nn.BatchNorm2d and module.running_var is not None


def select(order: Sequence[tuple[str, bool, bool]]) -> list[tuple[str, bool]]:
    """Of (path, is a convolution, follows one) what :meth:`Networks.order` gives."""
    chosen: list[tuple[str, bool]] = []
    for path, convolution, follows in order:
        # before the first pruned layer nothing has changed; right behind one its mean and variance are kept
        if convolution or (chosen and not follows):
            chosen.append((path, convolution))
    return chosen


def checked(value: Tensor, path: str, index: int, *, output: bool) -> Tensor:
    """``value`` as [N, c, H, W], if it is finite."""
    if not bool(torch.isfinite(value).all()):
        raise InputError(
            f"its {'output' if output else 'input'} is NaN or infinite on calibration batch {index}",
            where=path or "the model itself",
            fix="check the data and the model, for instance for overflow in float16",
        )
    return value if value.dim() == 4 else value.unsqueeze(0)


class Replay:
    """Networks that run from their beginning every time."""

    def __init__(self, model: nn.Module, calls: Sequence[Call]) -> None:
        self._models = (clone_module(model), clone_module(model))  # dense, pruned
        self._calls = calls
        self._device, self._dtype = device_and_dtype(model)

    @property
    def batches(self) -> int:
        return len(self._calls)

    def module(self, path: str, *, pruned: bool) -> nn.Module:
        return self._models[pruned].get_submodule(path)

    def _run(self, pruned: bool, index: int) -> Any:
        model = self._models[pruned]
        return run_call(model, self._calls[index], self._device, self._dtype, index)

    def order(self, plan: PruningPlan) -> list[tuple[str, bool]]:
        found = [pair for pair in named_modules(self._models[0]) if is_fitted(*pair, plan)]
        kinds = dict(found)
        order = call_order(found, partial(self._run, False, 0))
        return select([(path, isinstance(kinds[path], nn.Conv2d), follows) for path, follows in order])

    def capture(self, path: str, index: int, *, pruned: bool, output: bool) -> Tensor:
        value = capture(self.module(path, pruned=pruned), partial(self._run, pruned, index), output=output)
        if value is None:
            raise InputError(
                f"it is not called on calibration batch {index}",
                where=path or "the model itself",
                fix="leave out batches on which the model takes another way",
            )
        return checked(value, path, index, output=output)

    def finish(self, path: str, index: int, value: Tensor, *, pruned: bool) -> Any:
        left = [value]

        def exchange(module: nn.Module, args: Any, result: Tensor) -> Tensor:
            return left.pop().to(result.dtype).view(result.shape) if left else result

        handle = self.module(path, pruned=pruned).register_forward_hook(exchange)
        try:
            return self._run(pruned, index)
        finally:
            handle.remove()


class _Reached(BaseException):  # not an Exception: a model's own `except Exception` must not catch it
    """Ends a forward pass at the module asked for."""


def on_device(call: Call, device: torch.device, dtype: torch.dtype | None) -> Call:
    """A copy of ``call`` on ``device``, floating-point tensors as ``dtype`` (None: as they are)."""

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(device, dtype if leaf.is_floating_point() else None, copy=True)  # it may be written to

    args, kwargs = pytree.tree_map(moved, call)
    return args, kwargs


def failure(call: Call, index: int, error: Exception) -> InputError:
    """The error to raise if the model fails on batch ``index``."""
    shapes = [list(leaf.shape) for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor)]
    return InputError(
        f"the model fails on batch {index}, shapes {shapes}: {type(error).__name__}: {error}",
        where="calibration",
        fix="give batches of what model(...) takes; labels may follow in a tuple",
    )


def run_call(
    model: nn.Module, call: Call, device: torch.device, dtype: torch.dtype | None, index: int
) -> Any:
    """``model(*args, **kwargs)`` on a copy of batch ``index``.

    Raises:
        InputError: the model fails.
    """
    args, kwargs = on_device(call, device, dtype)
    try:
        with torch.no_grad():
            return model(*args, **kwargs)
    except InputError:
        raise
    except Exception as error:
        raise failure(call, index, error) from error


def capture(module: nn.Module, run: Callable[[], Any], *, output: bool) -> Tensor | None:
    """The first input (or the output) of ``module`` in ``run``, which ends there; None if it is not called."""
    found: list[Any] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["input"])
        raise _Reached

    def after(module: nn.Module, args: Any, result: Any) -> None:
        found.append(result)
        raise _Reached

    if output:
        handle = module.register_forward_hook(after)
    else:
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        run()
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0] if found else None


def call_order(modules: Sequence[tuple[str, nn.Module]], run: Callable[[], Any]) -> list[tuple[str, bool]]:
    """(name, whether its input is what another of the modules returned) of each module at its first call in ``run``."""
    order: dict[str, bool] = {}
    returned: list[Any] = []  # held: an identity must not be reused

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else kwargs.get("input")
            order.setdefault(name, any(given is value for value in returned))

        return hook

    def after(module: nn.Module, args: Any, result: Any) -> None:
        if isinstance(module, nn.Conv2d):
            returned.append(result)

    handles: list[Any] = []
    for name, module in modules:
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return list(order.items())
