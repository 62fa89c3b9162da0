"""coupling: channels that go together, and those that have to stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.filters.nets import Chain, Dense, Grouped, Residual, conv
from wsp_compiler.filters.coupling import Coupling, couple
from wsp_compiler.trace import trace


def coupling_of(model: nn.Module) -> Coupling:
    return couple(trace(model.eval()).units[""])


def groups(coupling: Coupling) -> list[list[tuple[str, int]]]:
    return [sorted(coupling.filters[number] for number in group) for group in coupling.components()]


def why(model: nn.Module, path: str) -> str | None:
    """Why the first filter of ``path`` has to stay, if all convolutions are prunable."""
    found = coupling_of(model)
    prunable = dict.fromkeys(found.paths)
    (group,) = [group for group in found.components() if found.filters.index((path, 0)) in group]
    return found.why_fixed(group, prunable)


def test_a_chain_has_no_ties() -> None:
    found = coupling_of(Chain())
    assert found.paths == ["body.0", "body.3", "body.6", "body.9"]
    assert all(len(group) == 1 for group in groups(found))
    assert not found.fixed


def test_additions_tie() -> None:
    found = coupling_of(Residual())
    assert groups(found)[3] == [("b", 3), ("c", 3), ("stem", 3)]
    assert [("a", 5)] in groups(found)
    assert found.fixed == dict.fromkeys(
        (number for number, (path, _) in enumerate(found.filters) if path == "out"),
        "their channels are read by output",
    )


def test_concatenations_keep_channels_apart() -> None:
    found = coupling_of(Dense())
    assert all(len(group) == 1 for group in groups(found))
    features = [node for node in found.values if node.target is torch.cat][-1]
    assert [found.filters[int(number)][0] for number in found.values[features]] == (
        ["stem"] * 8 + ["grows.0"] * 6 + ["grows.1"] * 6 + ["grows.2"] * 6
    )


def test_grouped_convolutions_tie_what_stands_at_the_same_place() -> None:
    found = coupling_of(Grouped())
    assert [("b", 1), ("b", 5), ("b", 9)] in groups(found)
    assert [("a", 2)] in groups(found)
    depthwise = next(node for node in found.values if node.target == "depthwise")
    assert found.values[depthwise].tolist() == [number for number in range(8) for _ in range(2)]


class Net(nn.Module):
    """conv1, then whatever is asked for."""

    def __init__(self, function: Any, **children: Any) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8), conv(8, 8)
        self.function = function
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (Net(lambda m, x: m.b(torch.softmax(m.a(x), 1))), "read by softmax"),
        (Net(lambda m, x: m.b(m.a(x) + x)), "read by add"),
        (Net(lambda m, x: m.b(m.b(m.a(x)))), "read by b, which is called more than once"),
        (Net(lambda m, x: (m.a(x).shape, m.b(m.a(x)))), "is called more than once"),
        (Net(lambda m, x: m.b(m.a(x)[:, :8])), "read by getitem"),
        (Net(lambda m, x: m.norm(m.a(x)), norm=nn.GroupNorm(2, 8)), "read by norm"),
        (Net(lambda m, x: m.head(m.a(x)), head=nn.Linear(6, 2)), "read by head"),
        (Net(lambda m, x: m.head(m.a(x).view(-1, 16)), head=nn.Linear(16, 2)), "read by view"),
        (
            Net(lambda m, x: m.b(torch.cat([m.a(x), x], 1)[:, :8]), a=conv(3, 8)),
            "read by cat",
        ),
    ],
)
def test_what_is_not_understood_stays(net: nn.Module, reason: str) -> None:
    found = why(net, "a") if "more than once" not in reason or "b," in reason else None
    if found is None:
        assert ("a", 0) not in coupling_of(net).filters  # not even followed
    else:
        assert reason in found


def written(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    z = F.relu(y, inplace=True)
    return m.b(z) + y.sum() + m.b.weight.sum()


def test_writing_into_an_image_that_others_read() -> None:
    reason = why(Net(written), "a")
    assert reason is not None
    assert "writes into an image that others read" in reason


def aliased(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    z = F.dropout(y, training=False)  # y itself
    return m.b(z.relu_()) + m.c(y)


def test_other_names_of_an_image_count() -> None:
    reason = why(Net(aliased, c=conv(8, 8)), "a")
    assert reason is not None
    assert "writes into" in reason
    fine = Net(lambda m, x: m.b(F.dropout(m.a(x), training=False).relu_()))
    assert why(fine, "a") is None


def test_ties_to_what_is_not_pruned() -> None:
    found = coupling_of(Residual())
    group = next(group for group in found.components() if len(group) == 3)
    assert found.why_fixed(group, {"stem": 0, "b": 0, "c": 0}) is None
    assert found.why_fixed(group, {"stem": 0, "b": 0}) == (
        "their channels are tied to those of c, whose filters are not pruned"
    )


def test_sizes_that_do_not_fit_are_not_followed() -> None:
    """An unbatched image [c, H, W] is concatenated by rows, which the sizes of the reader give away."""
    net = Net(lambda m, x: m.b(torch.cat([m.a(x), m.c(x)], 1)), c=conv(3, 8))
    reason = why(net, "a")
    assert reason is not None
    assert "read by b" in reason
