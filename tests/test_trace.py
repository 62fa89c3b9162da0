"""trace: whole models, and submodules where the whole cannot be traced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tests.graphs import Net, conv, run_traced, site_paths
from wsp_compiler.errors import InputError, ModelError
from wsp_compiler.trace import TracedModel, example_call, trace

X = torch.linspace(-1, 1, 2 * 4 * 6 * 5).view(2, 4, 6, 5)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Threads that wait for each other make small operations slow on a busy machine; undone in conftest."""
    torch.set_num_threads(1)


def test_a_whole_model_is_one_unit() -> None:
    model = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), nn.Sequential(conv())).eval()
    traced = trace(model, X)
    assert list(traced.units) == [""]
    assert traced.untraced == {}
    assert site_paths(traced) == ["0", "3.0"]
    assert traced.input_shapes == {"0": ((2, 4, 6, 5),), "3.0": ((2, 4, 6, 5),)}
    torch.testing.assert_close(run_traced(traced, X), model(X))


class Branches(Net):
    """Control flow on values, which torch.fx cannot trace."""

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if float(x.detach().sum()) > 0 else self.b(x)


@pytest.mark.parametrize("example", [None, X - 1])
def test_control_flow_in_the_root_leaves_its_children_traced(example: Tensor | None) -> None:
    model = Branches(a=nn.Sequential(conv(), nn.ReLU()), b=conv(bias=False))
    traced = trace(model, example)
    assert traced.untraced[""].startswith("torch.fx: ")
    assert traced.units.keys() == ({"a", "b"} if example is None else {"b"})
    for x in (X + 1, X - 1):
        torch.testing.assert_close(run_traced(traced, x), model(x))


def test_a_unit_that_the_example_does_not_reach_runs_as_it_was() -> None:
    model = Branches(a=nn.Sequential(conv(), nn.ReLU()), b=conv())
    traced = trace(model, X - 1)
    assert traced.untraced["a"] == "not called on example_inputs"
    assert not traced.input_shapes.get("a.0")
    torch.testing.assert_close(run_traced(traced, X + 1), model(X + 1))


class Shared(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x)) + self.head(x)


def test_a_module_called_twice_is_one_site_with_two_calls() -> None:
    model = Shared(stem=conv(), head=nn.Sequential(conv(), nn.ReLU()))
    traced = trace(model, X)
    assert site_paths(traced) == ["stem", "head.0", "head.0"]
    assert len(traced.input_shapes["head.0"]) == 2
    torch.testing.assert_close(run_traced(traced, X), model(X))


class Untraceable(Net):
    """Calls its children in turn, with control flow that defeats torch.fx."""

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x) if float(x.detach().abs().max()) >= 0 else x
        return x


def test_a_convolution_shared_by_two_units_has_one_path() -> None:
    shared = conv()
    model = Untraceable(a=nn.Sequential(shared, nn.ReLU()), b=nn.Sequential(nn.ReLU(), shared))
    traced = trace(model, X)
    assert list(traced.units) == ["a", "b"]
    assert site_paths(traced) == ["a.0", "a.0"]
    assert len(traced.input_shapes["a.0"]) == 2


def test_a_unit_used_under_two_names_is_replaced_under_both() -> None:
    block = nn.Sequential(conv(), nn.ReLU())

    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x) if float(x.detach().sum()) != 7 else x

    model = Twice(a=block, b=block)
    traced = trace(model)
    assert list(traced.units) == ["a"]
    runner = traced.assemble(traced.units)
    assert runner.a is runner.b
    torch.testing.assert_close(runner(X), model(X))


class Listed(Net):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x * self.table["scale"](x)


def test_module_lists_and_dicts() -> None:
    model = Listed(layers=nn.ModuleList([conv(), nn.ReLU(), conv()]), table=nn.ModuleDict({"scale": conv()}))
    assert site_paths(trace(model, X)) == ["layers.0", "layers.2", "table.scale"]

    class Broken(Listed):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.detach().sum()) != 7 else x

    broken = Broken(layers=model.layers, table=model.table)
    traced = trace(broken, X)
    assert list(traced.units) == ["layers.0", "layers.2", "table.scale"]
    torch.testing.assert_close(run_traced(traced, X), model(X))


class Options(Net):
    def forward(
        self, x: Tensor, skip: Tensor | None = None, repeat: int = 2, *, scale: float = 1.0
    ) -> dict[str, Any]:
        for _ in range(repeat):
            x = self.conv(x)
        return {"y": (x if skip is None else x + skip) * scale, "n": [x]}


def test_arguments_that_were_not_given_are_fixed_to_their_defaults() -> None:
    model = Options(conv=conv())
    traced = trace(model, X)
    assert traced.calls[""].fixed == {"skip": None, "repeat": 2}
    assert site_paths(traced) == ["conv", "conv"]
    torch.testing.assert_close(run_traced(traced, x=X, scale=3.0), model(X, scale=3.0))
    for other in ({"repeat": 3}, {"skip": X}):
        with pytest.raises(InputError, match=f"argument {next(iter(other))} was fixed to"):
            run_traced(traced, X, **other)


def test_examples_may_be_keywords_and_give_optional_arguments() -> None:
    model = Options(conv=conv())
    traced = trace(model, {"x": X, "skip": X, "repeat": 3})
    assert traced.calls[""].placeholders == ("x", "skip", "scale")
    torch.testing.assert_close(run_traced(traced, X, X + 1, 3), model(X, X + 1, 3))


def test_positional_only_arguments_and_odd_names() -> None:
    class Odd(Net):
        def forward(self, input: Tensor, /, flag: bool = True, *, extra: Tensor) -> Tensor:
            return self.conv(input) + extra if flag else input

    model = Odd(conv=conv())
    traced = trace(model)
    torch.testing.assert_close(run_traced(traced, X, extra=X), model(X, extra=X))


@pytest.mark.parametrize(
    ("given", "args", "kwargs"),
    [(X, (X,), {}), ((X, 1), (X, 1), {}), ([X], (X,), {}), ({"x": X}, (), {"x": X})],
)
def test_example_call(given: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert example_call(given) == (args, kwargs)


class LosesBranch(Net):
    """torch.fx follows one branch without noticing: a Proxy is not a Tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) if isinstance(x, Tensor) else self.block(x) * 0


def test_a_graph_that_lost_control_flow_is_noticed_with_an_example() -> None:
    model = LosesBranch(block=nn.Sequential(conv(), nn.ReLU()))
    traced = trace(model, X)
    assert traced.untraced == {"": "the traced graph computes something else"}
    assert list(traced.units) == ["block"]
    torch.testing.assert_close(run_traced(traced, X), model(X))


def test_only_the_unit_that_is_wrong_is_given_up() -> None:
    model = Untraceable(good=nn.Sequential(conv(), nn.ReLU()), bad=LosesBranch(block=conv()))
    traced = trace(model, X)
    assert list(traced.units) == ["good", "bad.block"]
    assert traced.untraced["bad"] == "the traced graph computes something else"
    torch.testing.assert_close(run_traced(traced, X), model(X))


def test_a_graph_of_another_dtype_is_noticed() -> None:
    class Autocast(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.block(x)

    model = Autocast(block=nn.Sequential(conv(), nn.ReLU()))
    traced = trace(model, X)
    assert list(traced.units) == ["block"]
    assert run_traced(traced, X).dtype == model(X).dtype


def test_a_graph_that_fails_where_the_model_does_not_is_given_up() -> None:
    class Shapes(Net):
        def forward(self, x: Tensor) -> Tensor:
            mask = torch.ones(2, 1, 6, 5) if isinstance(x, Tensor) else torch.ones(3, 1, 6, 5)
            return self.block(x) * mask

    traced = trace(Shapes(block=nn.Sequential(conv(), nn.ReLU())), X)
    assert traced.untraced[""].startswith("the traced graph fails: ")
    assert list(traced.units) == ["block"]


def test_random_models_agree_with_themselves() -> None:
    class Noisy(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.block(x + torch.rand_like(x))

    model = Noisy(block=nn.Sequential(conv(), nn.ReLU()))
    state = torch.get_rng_state()
    traced = trace(model, X)
    assert list(traced.units) == [""]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_whose_assembly_differs_is_refused() -> None:
    class Counting(Net):
        def forward(self, x: Tensor) -> Tensor:
            kind = type(self.block).__name__
            return self.block(x) * (1.0 if kind == "Sequential" and float(x.detach().sum()) != 7 else 2.0)

    with pytest.raises(ModelError, match="does not compute what the model computes") as caught:
        trace(Counting(block=nn.Sequential(conv(), nn.ReLU())), X)
    assert caught.value.where == "Counting"
    assert caught.value.fix


class CallsParts(Net):
    """Untraceable, and reaches into its encoder."""

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().sum()) == 7:
            return x
        x = self.encoder.stem(x)
        for layer in self.encoder.layers:
            x = layer(x)
        return x


class Encoder(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.stem(x))


def test_parts_called_past_a_unit_become_units() -> None:
    stem = nn.Sequential(conv(), nn.ReLU())
    model = CallsParts(encoder=Encoder(stem=stem, layers=nn.Sequential(conv(), nn.ReLU(), conv())))
    traced = trace(model, X)
    assert list(traced.units) == ["encoder.stem", "encoder.layers.0", "encoder.layers.2"]
    assert traced.untraced["encoder"] == "its parent calls parts of it"
    torch.testing.assert_close(run_traced(traced, X), model(X))


def test_without_an_example_such_a_call_is_an_error_and_not_a_dense_result() -> None:
    model = CallsParts(encoder=Encoder(stem=nn.Sequential(conv()), layers=nn.Sequential(conv())))
    traced = trace(model)
    with pytest.raises(ModelError, match="calls parts of it") as caught:
        run_traced(traced, X)
    assert caught.value.where == "encoder"
    assert "example_inputs" in caught.value.fix


def test_untraced_code_may_ask_for_the_class() -> None:
    class Typed(Net):
        def forward(self, x: Tensor) -> Tensor:
            assert float(x.detach().sum()) != 7
            return self.block(x) if isinstance(self.block, Encoder) else x

    model = Typed(block=Encoder(stem=conv(), layers=nn.Sequential(conv())))
    traced = trace(model, X)
    assert list(traced.units) == ["block"]
    torch.testing.assert_close(run_traced(traced, X), model(X))


@pytest.mark.parametrize("padding", [0, 1, "same"])
def test_the_root_may_be_a_convolution(padding: Any) -> None:
    model = nn.Conv2d(4, 5, 3, padding=padding).eval()
    traced = trace(model, X)
    assert site_paths(traced) == [""]
    assert traced.input_shapes == {"": ((2, 4, 6, 5),)}
    torch.testing.assert_close(run_traced(traced, X), model(X))
    torch.testing.assert_close(run_traced(traced, input=X), model(X))


def test_a_root_convolution_with_more_arguments() -> None:
    class Scaled(nn.Conv2d):
        def forward(self, input: Tensor, scale: float = 2.0, twice: bool = True) -> Tensor:
            return super().forward(input) * (scale * 2 if twice else scale)

    model = Scaled(4, 4, 3).eval()
    traced = trace(model, {"input": X, "scale": 5.0})
    torch.testing.assert_close(run_traced(traced, X, 3.0), model(X, 3.0))
    torch.testing.assert_close(run_traced(traced, X), model(X))


def test_the_owner_of_a_path_is_the_innermost_module() -> None:
    traced = TracedModel(nn.Sequential(), untraced={"": "root", "a": "a", "a.b": "b"})
    traced.units["c"] = traced.units["a.b.c"] = fx.symbolic_trace(nn.ReLU())
    owners = {path: traced.owner(path) for path in ("ab", "a.x", "a.bc", "a.b.x", "a.b.c.d", "c", "cd.e")}
    assert owners == {
        "ab": "", "a.x": "a", "a.bc": "a", "a.b.x": "a.b", "a.b.c.d": "a.b.c", "c": "c", "cd.e": "",
    }  # fmt: skip
    assert TracedModel(nn.Sequential()).owner("a") is None


def test_functional_convolutions_are_not_sites() -> None:
    class Functional(Net):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(self.conv(x), self.conv.weight)

    assert site_paths(trace(Functional(conv=conv()), X)) == ["conv"]
