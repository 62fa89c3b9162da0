"""trace: hooks, replaced forwards, what is refused, and the user's model left as it was."""

from __future__ import annotations

import abc
import contextlib
import copy
import math
import types
from collections.abc import Callable
from math import sqrt
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

from tests.graphs import Net, conv, run_traced, site_paths
from wsp_compiler.errors import InputError, ModelError
from wsp_compiler.trace import check_model, relative_error, trace

X = torch.linspace(-1, 1, 2 * 4 * 6 * 5).view(2, 4, 6, 5)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Threads that wait for each other make small operations slow on a busy machine; undone in conftest."""
    torch.set_num_threads(1)


class Encoder(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.stem(x))


class ReachesIn(Net):
    """Untraceable, and calls a part of its encoder."""

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder.stem(x) if float(x.detach().sum()) != 7 else x


class Branches(Net):
    """Control flow on values, which torch.fx cannot trace."""

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if float(x.detach().sum()) > 0 else self.b(x)


class InTurn(Net):
    """Calls its children in turn, with control flow that defeats torch.fx."""

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x) if float(x.detach().abs().max()) >= 0 else x
        return x


class LosesBranch(Net):
    """torch.fx follows one branch without noticing: a Proxy is not a Tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) if isinstance(x, Tensor) else self.block(x) * 0


def test_hooks_keep_working() -> None:
    seen: list[int] = []
    model = nn.Sequential(nn.Sequential(conv(), nn.ReLU()), conv(), nn.ReLU()).eval()
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    model[2].register_forward_pre_hook(lambda module, args: seen.append(len(args)))
    traced = trace(model)
    assert "0 has forward hooks" in traced.untraced[""]
    assert traced.untraced["0"] == "torch.fx: it has forward hooks"
    assert list(traced.units) == ["0.0", "1"]
    torch.testing.assert_close(run_traced(traced, X), model(X))
    assert seen == [1, 1]


def test_a_hook_on_the_root_or_on_a_convolution() -> None:
    model = nn.Sequential(conv(), conv()).eval()
    model.register_forward_hook(lambda module, args, output: -output)
    model[0].register_forward_hook(lambda module, args, output: output + 1)
    traced = trace(model, X)
    assert list(traced.units) == ["1"]
    assert set(traced.untraced) == {"", "0"}
    torch.testing.assert_close(run_traced(traced, X), model(X))


def test_hooks_of_leaf_modules_run_on_every_call() -> None:
    seen: list[int] = []
    model = nn.Sequential(conv(), nn.ReLU()).eval()
    model[1].register_forward_hook(lambda *_: seen.append(1))
    traced = trace(model)
    assert list(traced.units) == [""]
    assert seen == []
    run_traced(traced, X)
    run_traced(traced, X)
    assert seen == [1, 1]


def test_a_forward_replaced_on_the_instance_is_what_is_traced() -> None:
    model = Encoder(stem=conv(), layers=conv())

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.layers(x) - x

    model.forward = types.MethodType(forward, model)
    traced = trace(model)
    assert site_paths(traced) == ["layers"]
    torch.testing.assert_close(run_traced(traced, X), model.layers(X) - X)


def test_a_replaced_forward_that_cannot_be_followed_runs_as_it_was() -> None:
    model = InTurn(a=conv(), b=nn.Sequential(conv(), nn.ReLU()))
    block = model.b
    block.forward = lambda x: block[0](x) * 3  # refers to the module itself, not to a clone
    traced = trace(model)
    assert list(traced.units) == ["a"]
    assert "b" in traced.untraced
    torch.testing.assert_close(run_traced(traced, X), model(X))


def test_models_that_are_graph_modules_are_traced_whole() -> None:
    model = fx.symbolic_trace(nn.Sequential(conv(), nn.ReLU()).eval())
    traced = trace(model, X)
    assert list(traced.units) == [""]
    torch.testing.assert_close(run_traced(traced, X), model(X))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_scripted_submodules_are_leaves() -> None:
    model = nn.Sequential(conv(), torch.jit.trace(nn.ReLU(), X)).eval()
    traced = trace(model, X)
    assert list(traced.units) == [""]
    torch.testing.assert_close(run_traced(traced, X), model(X))


def test_wrappers_of_torch_nn_are_traced_through() -> None:
    model = nn.Sequential(nn.DataParallel(nn.Sequential(conv(), nn.ReLU()), device_ids=[])).eval()
    assert site_paths(trace(model, X)) == ["0.module.0"]


class Stateful(Net):
    """Stores what it computes, in every way that Python offers."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        self.last = y
        self.history.append(y)
        self.cache["y"] = y
        self.child.mark = y
        return self.child(y)


def state_of(model: nn.Module) -> list[Any]:
    """Everything that tracing could have changed."""
    found: list[Any] = []
    for path, module in model.named_modules():
        found.append((path, id(module), type(module), module.training, sorted(module.__dict__)))
        found.append([list(entries) for entries in (module._modules, module._parameters, module._buffers)])
        found.append([dict(module._forward_hooks), dict(module._forward_pre_hooks)])
        found.append(
            [
                (name, copy.copy(value))
                for name, value in module.__dict__.items()
                if type(value) in (list, dict)
            ]
        )
    tensors = model.state_dict(keep_vars=True)
    return [*found, {name: (id(t), t.requires_grad, t._version) for name, t in tensors.items()}]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(inplace=True)).eval(),
    "stateful": lambda: Stateful(conv=conv(), child=nn.Sequential(conv()), history=[], cache={}),
    "branches": lambda: Branches(a=nn.Sequential(conv(), nn.ReLU()), b=conv()),
    "lost": lambda: LosesBranch(block=nn.Sequential(conv(), nn.ReLU())),
    "parts": lambda: ReachesIn(encoder=Encoder(stem=nn.Sequential(conv()), layers=nn.Sequential(conv()))),
    "convolution": conv,
}


@pytest.mark.parametrize("example", [None, X])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_users_model_is_not_modified(name: str, example: Tensor | None) -> None:
    model = MODELS[name]().eval()
    before, values = state_of(model), copy.deepcopy(model.state_dict())
    traced = trace(model, example)
    with contextlib.suppress(ModelError):  # calls parts, and there was no example to see it
        run_traced(traced, X)
    assert state_of(model) == before
    for key, value in model.state_dict().items():
        assert torch.equal(value, values[key])


def test_the_example_is_not_modified() -> None:
    class InPlace(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.mul_(2))

    x = X.clone()
    trace(InPlace(conv=conv()), x)
    assert torch.equal(x, X)


def test_later_changes_of_the_model_do_not_reach_the_graph() -> None:
    model = nn.Sequential(conv(), nn.Dropout(0.9), nn.BatchNorm2d(4)).eval()
    traced = trace(model)
    expected = run_traced(traced, X)
    model.train()
    model[0].register_forward_hook(lambda module, args, output: output * 0)
    assert torch.equal(run_traced(traced, X), expected)


def test_tensors_are_shared_with_the_model() -> None:
    model = nn.Sequential(conv(), nn.ReLU()).eval()
    parameters = dict(trace(model).units[""].named_parameters())
    assert parameters["0.weight"] is model[0].weight


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._orig_mod = inner
        self.eval()


def test_check_model_unwraps_compiled_modules() -> None:
    model = conv().eval()
    assert check_model(Wrapped(model)) is model


@pytest.mark.parametrize("model", [None, 3, conv, lambda x: x, torch.zeros(1)])
def test_something_that_is_no_module_is_refused(model: Any) -> None:
    with pytest.raises(ModelError, match=r"expected an eager torch\.nn\.Module") as caught:
        check_model(model)
    assert caught.value.where == "model"
    assert caught.value.fix


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_scripted_model_is_refused() -> None:
    with pytest.raises(ModelError, match="TopLevelTracedModule"):
        check_model(torch.jit.trace(nn.ReLU(), X))


def test_a_model_in_train_mode_is_refused_and_the_module_is_named() -> None:
    model = nn.Sequential(conv(), nn.Sequential(nn.BatchNorm2d(4), nn.Dropout()))
    with pytest.raises(ModelError, match="Sequential is in train mode") as caught:
        trace(model)
    assert "model.eval()" in caught.value.fix
    model.eval()
    model[1][0].train()
    with pytest.raises(ModelError, match=r"1\.0 is in train mode"):
        trace(model)
    model.eval()
    model[1][1].train()
    with pytest.raises(ModelError, match=r"1\.1 is in train mode"):
        trace(model)
    model.eval()
    model[0].train()  # changes nothing
    trace(model)


@pytest.mark.parametrize("example", [torch.zeros(1, 3, 6, 6), (X, X), {"y": X}, "image", ()])
def test_examples_that_the_model_does_not_take(example: Any) -> None:
    with pytest.raises(InputError, match="the model itself fails") as caught:
        trace(nn.Sequential(conv(), nn.ReLU()).eval(), example)
    assert caught.value.where == "example_inputs"
    assert "tuple of arguments" in caught.value.fix


def test_relative_error() -> None:
    a = torch.tensor([3.0, 4.0])
    assert relative_error(a, a) == 0
    assert relative_error(a, torch.tensor([3.0, 4.5])) == pytest.approx(0.1)
    special = torch.tensor([3.0, 4.0, float("inf"), float("-inf"), float("nan")])
    assert relative_error(special, special.clone()) == 0
    assert not relative_error(special, torch.tensor([3.0, 4.0, float("inf"), float("inf"), 0.0])) < 1e9
    assert not relative_error(a, torch.tensor([3.0, float("nan")])) < 1e9
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.zeros(2), a, floor=100.0) == pytest.approx(0.05)
    assert relative_error(torch.zeros(0), torch.zeros(0)) == 0
    assert relative_error(torch.tensor([3 + 4j]), torch.tensor([3 + 3j])) == pytest.approx(0.2)


class Registered(Net):
    """A class that notes its subclasses, and asks something of them."""

    known: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, *, key: str) -> None:
        Registered.known[key] = cls


class Entry(Registered, key="entry"):
    def forward(self, x: Tensor) -> Tensor:
        assert type(self) is Entry
        return self.conv(x) * sqrt(x.size(1))  # a function that takes no placeholder, in these globals


def test_classes_do_not_notice() -> None:
    model = InTurn(a=Entry(conv=conv()))
    traced = trace(model, X)
    assert list(traced.units) == ["a"]
    torch.testing.assert_close(run_traced(traced, X), model(X))
    assert isinstance(traced.assemble(traced.units).a, Entry)
    assert list(trace(Entry(conv=conv())).units) == [""]
    assert Registered.known == {"entry": Entry}
    assert sqrt is math.sqrt


def test_abstract_and_slotted_classes() -> None:
    class Abstract(Net, abc.ABC):
        @abc.abstractmethod
        def forward(self, x: Tensor) -> Tensor: ...

    class Concrete(Abstract):
        __slots__ = ("slot",)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    model = InTurn(a=Concrete(conv=conv()))
    assert list(trace(model, X).units) == ["a"]
    assert list(trace(model.a, X).units) == [""]
