"""sites: one entry for every convolution, with the reason where it cannot be lowered."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
import torchvision.models
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from wsp_compiler.errors import ModelError
from wsp_compiler.sites import ConvSite, find_sites, padding_of, unsupported
from wsp_compiler.speed import CallFormat

X = torch.randn(2, 4, 9, 7)


class OwnForward(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight * 2, bias)


class Renamed(nn.Conv2d):
    """A subclass that changes nothing."""


def hooked(conv: nn.Conv2d) -> nn.Conv2d:
    conv.register_forward_hook(lambda module, args, output: output)
    return conv


def pre_hooked(conv: nn.Conv2d) -> nn.Conv2d:
    conv.register_forward_pre_hook(lambda module, args: args)
    return conv


def patched(conv: nn.Conv2d) -> nn.Conv2d:
    conv.forward = types.MethodType(lambda self, x: x, conv)
    return conv


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 5, 3),
        nn.Conv2d(4, 5, 3, padding=1, bias=False),
        nn.Conv2d(4, 5, 3, padding="same"),
        nn.Conv2d(4, 5, 3, padding="valid"),
        nn.Conv2d(4, 5, 3, padding=(0, 2)),
        nn.Conv2d(4, 5, (3, 3), stride=(1, 1), padding=7),
        nn.Conv2d(4, 5, 3).half(),
        nn.Conv2d(4, 5, 3).bfloat16(),
        nn.Conv2d(4, 5, 3).to(memory_format=torch.channels_last),
        Renamed(4, 5, 3),
        parametrizations.weight_norm(nn.Conv2d(4, 5, 3)),
    ],
)
def test_eligible(conv: nn.Conv2d) -> None:
    assert unsupported(conv) is None
    (site,) = find_sites(conv.eval())
    assert site.reject is None
    assert (site.path, site.filters, site.channels, site.calls) == ("", 5, 4, 1)
    assert site.bias == (conv.bias is not None)


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(4, 5, 1), "kernel 1x1, not 3x3"),
        (nn.Conv2d(4, 5, (3, 5)), "kernel 3x5, not 3x3"),
        (nn.Conv2d(4, 5, 3, stride=2), "stride 2x2, not 1"),
        (nn.Conv2d(4, 5, 3, stride=(1, 2)), "stride 1x2, not 1"),
        (nn.Conv2d(4, 5, 3, dilation=(2, 1)), "dilation 2x1, not 1"),
        (nn.Conv2d(4, 4, 3, groups=2), "2 groups, not 1"),
        (nn.Conv2d(4, 5, 3, padding=1, padding_mode="circular"), "padding mode 'circular', not zeros"),
        (nn.Conv2d(4, 5, 3).double(), "dtype torch.float64, not float32, float16 or bfloat16"),
        (nn.Conv2d(4, 5, 3, device="meta"), "weights on the meta device"),
        (OwnForward(4, 5, 3), "OwnForward has a forward of its own"),
        (OwnConvForward(4, 5, 3), "OwnConvForward has a forward of its own"),
        (patched(nn.Conv2d(4, 5, 3)), "Conv2d has a forward of its own"),
        (hooked(nn.Conv2d(4, 5, 3)), "it has forward hooks"),
        (pre_hooked(nn.Conv2d(4, 5, 3)), "it has forward hooks"),
    ],
)
@pytest.mark.parametrize("alone", [True, False])
def test_rejected(conv: nn.Conv2d, reason: str, alone: bool) -> None:
    (site,) = find_sites((conv if alone else nn.Sequential(conv)).eval())
    assert site.reject == reason
    assert site.path == ("" if alone else "0")


@pytest.mark.parametrize(
    ("conv", "expected"),
    [
        (nn.Conv2d(1, 1, 3), (0, 0)),
        (nn.Conv2d(1, 1, 3, padding=2), (2, 2)),
        (nn.Conv2d(1, 1, 3, padding=(0, 2)), (0, 2)),
        (nn.Conv2d(1, 1, 3, padding="same"), (1, 1)),
        (nn.Conv2d(1, 1, 3, padding="valid"), (0, 0)),
    ],
)
def test_padding_and_output_sizes(conv: nn.Conv2d, expected: tuple[int, int]) -> None:
    assert padding_of(conv) == expected
    for x in (torch.randn(2, 1, 9, 7), torch.randn(1, 9, 7)):
        (site,) = find_sites(conv.eval(), x)
        y = conv(x)
        assert site.input_shapes == (tuple(x.shape),)
        assert site.output_sizes == ((2 if x.dim() == 4 else 1, y.shape[-2], y.shape[-1]),)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)
        self.unused = nn.Conv2d(4, 4, 3)
        self.kernel = nn.Parameter(torch.randn(4, 4, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.conv(x), self.kernel) + torch.conv2d(self.conv(x), self.unused.weight)


def test_functional_and_unused_convolutions_are_listed() -> None:
    sites = find_sites(Functional().eval())
    assert [(site.path, site.calls) for site in sites[:2]] == [("conv", 2), ("unused", 0)]
    assert sites[0].reject is None
    assert sites[1].reject == "not called in the traced graph"
    assert [site.path for site in sites[2:]] == ["graph node conv2d", "graph node conv2d_1"]
    assert {site.reject for site in sites[2:]} == {"called as a function, not as a Conv2d module"}


class Dynamic(nn.Module):
    """Cannot be traced; one child can."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = Functional()
        self.layer10 = nn.Conv2d(4, 4, 3)
        self.lambda_conv = nn.Conv2d(4, 4, 3)
        self.lambda_conv.forward = lambda x: x if float(x.sum()) > 0 else -x

    def forward(self, x: Tensor) -> Tensor:
        return self.layer10(self.layer1(x)) if float(x.sum()) != 7 else x


def test_the_reason_is_that_of_the_innermost_module() -> None:
    sites = {site.path: site.reject for site in find_sites(Dynamic().eval())}
    assert sites == {
        "layer1.conv": None,
        "layer1.unused": "not called in the traced graph",
        "layer10": None,
        "lambda_conv": "Conv2d has a forward of its own",
        "graph node layer1.conv2d": "called as a function, not as a Conv2d module",
        "graph node layer1.conv2d_1": "called as a function, not as a Conv2d module",
    }


class Shortcut(Dynamic):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer10(x) if float(x.sum()) != 7 else self.layer1(x)


def test_what_the_example_does_not_reach_is_not_lowered() -> None:
    rejects = {site.path: site.reject for site in find_sites(Shortcut().eval(), X)}
    assert rejects["layer10"] is None
    assert rejects["layer1.conv"] == "not called on example_inputs"


def test_below_a_replaced_forward_the_reason_is_the_modules() -> None:
    model = Shortcut().eval()
    model.forward = types.MethodType(Shortcut.forward, model)
    assert str(find_sites(model)[2].reject).startswith("torch.fx: ")


def test_shapes_of_every_call() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.head(x), self.head(input=F.max_pool2d(x, 2))

    (site,) = find_sites(Pyramid().eval(), X)
    assert site.input_shapes == ((2, 4, 9, 7), (2, 4, 4, 3))
    assert site.output_sizes == ((2, 9, 7), (2, 4, 3))
    assert find_sites(Pyramid().eval())[0].input_shapes == ()


def test_tied_modules_are_listed_once() -> None:
    conv = nn.Conv2d(4, 4, 3)
    sites = find_sites(nn.Sequential(conv, nn.ReLU(), conv).eval())
    assert [(site.path, site.calls) for site in sites] == [("0", 2)]


@pytest.mark.parametrize(
    ("name", "options", "eligible", "total"),
    [
        ("resnet18", {}, 13, 20),
        ("resnet50", {}, 13, 53),
        ("vgg16", {"init_weights": False}, 13, 13),
        ("densenet121", {}, 58, 120),
        ("googlenet", {"aux_logits": False, "init_weights": False}, 19, 57),
        ("mobilenet_v2", {}, 0, 52),
        ("convnext_tiny", {}, 0, 22),
    ],
)
def test_torchvision(name: str, options: dict[str, Any], eligible: int, total: int) -> None:
    with torch.device("meta"):  # no time for weights
        model = getattr(torchvision.models, name)(weights=None, **options).eval()
    model = model.to_empty(device="cpu")
    sites = find_sites(model)
    assert len(sites) == total
    assert sum(site.reject is None for site in sites) == eligible
    for site in sites:
        good = (site.kernel, site.stride) == ((3, 3), (1, 1)) and model.get_submodule(site.path).groups == 1
        assert (site.reject is None) == good
        assert site.calls == 1


def test_train_mode_is_refused() -> None:
    with pytest.raises(ModelError, match="train mode"):
        find_sites(nn.Sequential(nn.Conv2d(4, 4, 3)))


def test_a_site_is_plain_data() -> None:
    site = ConvSite("a", 4, 4, (3, 3), (1, 1), (1, 1), True, 1)
    assert site == ConvSite("a", 4, 4, (3, 3), (1, 1), (1, 1), True, 1)
    assert hash(site)
    assert site.output_sizes == ()


def test_formats_of_calls_are_recorded() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)).eval()
    x = torch.randn(2, 4, 9, 8).contiguous(memory_format=torch.channels_last)
    first, second = find_sites(model, x)
    assert first.formats == (CallFormat((2, 4, 9, 8), torch.float32, True),)
    assert second.formats[0].shape == second.input_shapes[0] == (2, 4, 7, 6)
    (half, _) = find_sites(model.bfloat16(), x.bfloat16().contiguous())
    assert half.formats == (CallFormat((2, 4, 9, 8), torch.bfloat16, False),)
    assert find_sites(model)[0].formats == ()
