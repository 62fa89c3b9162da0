"""clone: new module objects over the same tensors; nothing else is shared that a call could write to."""

from __future__ import annotations

import collections
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wsp_compiler.clone import clone_module, named_modules


class Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.tied = self.conv
        self.norm = nn.BatchNorm2d(4)
        self.stages = [self.conv, self.norm]
        self.named = {"conv": self.conv, "pair": (self.norm, 1)}
        self.callback = self.helper
        self.seen: list[Any] = []
        self.loop: dict[str, Any] = {}
        self.loop["self"] = self.loop

    def helper(self) -> Parent:
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for stage in self.stages:
            y = stage(y)
        self.seen.append(y)
        self.last = y
        return y


def test_tensors_are_shared_and_modules_are_not() -> None:
    model = Parent().eval()
    clone = clone_module(model)
    assert type(clone) is Parent
    assert [path for path, _ in named_modules(clone)] == [path for path, _ in named_modules(model)]
    for (_, ours), (_, theirs) in zip(named_modules(clone), named_modules(model), strict=True):
        assert ours is not theirs
    for ours, theirs in zip(clone.state_dict().values(), model.state_dict().values(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr()
    assert clone.conv.weight is model.conv.weight


def test_references_follow_the_clone() -> None:
    model = Parent()
    clone = clone_module(model)
    assert clone.tied is clone.conv
    assert clone.stages[0] is clone.conv
    assert clone.named["conv"] is clone.conv
    assert clone.named["pair"][0] is clone.norm
    assert clone.callback() is clone
    assert clone.loop["self"] is clone.loop
    assert clone.loop is not model.loop


def test_calling_the_clone_leaves_the_original_alone() -> None:
    model = Parent().eval()
    keys = set(model.__dict__)
    clone = clone_module(model)
    x = torch.randn(1, 3, 5, 5)
    assert torch.equal(clone(x), model(x))
    assert len(clone.seen) == len(model.seen) == 1
    del model.last
    assert set(model.__dict__) == keys
    clone.train()
    clone.norm.register_forward_hook(lambda *_: None)
    del clone.norm._buffers["running_mean"]
    clone.conv.extra = nn.Identity()
    assert not model.training
    assert not model.norm.training
    assert not model.norm._forward_hooks
    assert model.norm.running_mean is not None
    assert not hasattr(model.conv, "extra")


def test_hooks_and_instance_attributes_are_kept() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    calls: list[str] = []
    model[0].register_forward_hook(lambda *_: calls.append("hook"))
    clone = clone_module(model)
    clone(torch.randn(1, 3, 5, 5))
    assert calls == ["hook"]


def test_a_forward_replaced_by_a_method_belongs_to_the_clone() -> None:
    model = Parent().eval()

    def forward(self: Parent, x: Tensor) -> Parent:
        return self

    model.forward = types.MethodType(forward, model)
    clone = clone_module(model)
    assert clone(torch.zeros(1)) is clone


def test_a_compiled_call_of_the_original_is_dropped() -> None:
    model = nn.Conv2d(3, 4, 3)
    model._compiled_call_impl = lambda *_: pytest.fail("called the original")
    assert clone_module(model)(torch.randn(1, 3, 5, 5)).shape == (1, 4, 3, 3)


def test_replaced_modules_stand_in_everywhere() -> None:
    model = Parent()
    other = nn.Identity()
    clone = clone_module(model, {id(model.conv): other})
    assert clone.conv is other
    assert clone.tied is other
    assert clone.stages[0] is other
    assert model.stages[0] is model.conv


def test_containers_keep_their_type() -> None:
    model = nn.Module()
    model.a = collections.OrderedDict(x=1)
    model.b = collections.defaultdict(list, x=[1])
    model.c = {1, 2}
    model.d = (1, [2])
    clone = clone_module(model)
    for name in "abcd":
        ours, theirs = getattr(clone, name), getattr(model, name)
        assert type(ours) is type(theirs)
        assert ours == theirs
        assert ours is not theirs
    assert clone.d[1] is not model.d[1]
    assert clone.b["new"] == []
    assert "new" not in model.b


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_scripted_modules_are_shared() -> None:
    scripted = torch.jit.trace(nn.ReLU(), torch.zeros(1))
    model = nn.Sequential(scripted)
    assert clone_module(model)[0] is scripted
