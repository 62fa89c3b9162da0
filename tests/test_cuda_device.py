"""What only a GPU can show: the kernels on the device, streams, graphs, both compilers, whole networks."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import wsp_compiler
from wsp_compiler.winograd import output_size, transform, transform_weight

pytestmark = pytest.mark.cuda

TOLERANCE = {"fp32": (1e-5, 1e-4), "tf32": (2e-3, 1e-2), "fp16": (2e-3, 1e-2), "bf16": (2e-2, 1e-1)}
DTYPE = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def kept_convolution(x: Tensor, conv: nn.Conv2d, keep: Tensor, tile: int, padding: tuple[int, int]) -> Tensor:
    """Float64 truth on the CPU: the kept Winograd weights, by einsum."""
    x = x.detach().double().cpu()
    U = transform_weight(conv.weight.detach().cpu(), tile)
    U = U * keep.expand(U.shape)
    p = tile + 2
    sizes = [output_size(x.shape[2 + i], padding[i]) for i in (0, 1)]
    counts = [-(-size // tile) for size in sizes]
    extra = [counts[i] * tile + 2 - x.shape[2 + i] - padding[i] for i in (0, 1)]
    d = F.pad(x, (padding[1], extra[1], padding[0], extra[0])).unfold(2, p, tile).unfold(3, p, tile)
    BT, AT = transform(tile).tensor("BT", torch.float64), transform(tile).tensor("AT", torch.float64)
    V = torch.einsum("ai,nchwij,bj->abnchw", BT, d, BT)
    M = torch.einsum("abfc,abnchw->abnfhw", U.view(p, p, *U.shape[1:]), V)
    y = torch.einsum("xa,abnfhw,yb->nfhxwy", AT, M, AT)
    y = y.reshape(*y.shape[:2], counts[0] * tile, counts[1] * tile)[:, :, : sizes[0], : sizes[1]]
    return y if conv.bias is None else y + conv.bias.detach().double().cpu().view(1, -1, 1, 1)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    difference = actual.double().cpu() - expected
    assert float(difference.norm()) <= tolerance * float(expected.norm())
    if expected.numel():
        assert float(difference.abs().max()) <= 8 * tolerance * float(expected.square().mean().sqrt())


SHAPES = [  # batch, c, n, H, W, padding
    (2, 32, 48, 7, 7, (1, 1)),
    (1, 3, 24, 13, 20, (1, 1)),
    (3, 40, 1, 9, 5, (0, 2)),
    (1, 64, 130, 1, 1, (1, 1)),
    (0, 32, 32, 8, 8, (1, 1)),
    (2, 70, 36, 30, 17, (2, 0)),
    (1, 32, 32, 8, 8, (1, 1)),
    (2, 64, 96, 15, 12, (1, 1)),  # channels_last: the fused kernel in float16
]
PATTERNS = [
    ("dense", "row"),
    ("bwsp", "row"),
    ("bwsp", "column"),
    ("wsp", "row"),
    ("wsp", "column"),
    ("fp", "row"),
]


@pytest.mark.parametrize(("method", "direction"), PATTERNS)
@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
def test_ragged_shapes(method: str, direction: str, tile: int, precision: str) -> None:
    layouts = itertools.cycle([torch.contiguous_format, torch.channels_last])
    for batch, c, n, height, width, padding in SHAPES:
        dtype = DTYPE[precision]
        conv = nn.Conv2d(c, n, 3, padding=padding, device="cuda", dtype=dtype).eval()
        layout = next(layouts)
        x = torch.randn(batch, c, height, width, device="cuda").to(dtype).contiguous(memory_format=layout)
        rule = wsp_compiler.PruneRule(".*", method=method)
        compiled = wsp_compiler.compile(
            conv, 0.7, method=method, direction=direction, tile=tile, rules=[rule], precision=precision
        )
        y = compiled(x)
        with torch.no_grad():
            eager = conv(x)
        assert (y.shape, y.dtype, y.device) == (eager.shape, eager.dtype, eager.device)
        if y.numel():
            assert y.is_contiguous(memory_format=layout)
        truth = kept_convolution(x, conv, compiled.plan[""].keep, tile, padding)
        assert_close(y, truth, TOLERANCE[precision][tile // 4])
        assert torch.equal(y, compiled(x))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_strided_input_and_many_slices(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from wsp_compiler.codegen import cuda_launch

    monkeypatch.setattr(cuda_launch, "SLICE_ELEMENTS", 1 << 18)
    dtype = DTYPE[precision]
    conv = nn.Conv2d(32, 32, 3, padding=1, device="cuda", dtype=dtype).eval()
    wide = torch.randn(9, 64, 33, 60, device="cuda", dtype=dtype)
    compiled = wsp_compiler.compile(conv, 0.5, precision=precision)
    for x in (wide[:, 5:37, :, ::2], wide[:1, :32].expand(4, -1, -1, -1), wide.transpose(2, 3)[:, :32]):
        truth = kept_convolution(x, conv, compiled.plan[""].keep, 2, (1, 1))
        assert_close(compiled(x), truth, TOLERANCE[precision][0])


def test_stages_apart_equal_the_merged_kernels() -> None:
    model = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()).cuda().eval()
    x = torch.randn(2, 32, 21, 21, device="cuda")
    merged = wsp_compiler.compile(model, 0.6)(x)
    apart = wsp_compiler.compile(model, 0.6, passes=wsp_compiler.pipeline.without("merge_stages"))(x)
    assert torch.equal(merged, apart)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.1), nn.PReLU(32), nn.PReLU()])
def test_epilogues(activation: nn.Module) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(32, 32, 3, padding=1)
            self.activation = copy.deepcopy(activation)

        def forward(self, x: Tensor) -> Tensor:
            return self.activation(self.conv(x) * 1 if False else self.conv(x) + x)

    block = Block().cuda().eval()
    x = torch.randn(2, 32, 15, 11, device="cuda")
    compiled = wsp_compiler.compile(block, 0.5, precision="fp32")
    with torch.no_grad():
        truth = block.activation.double()(
            (kept_convolution(x, block.conv, compiled.plan["conv"].keep, 2, (1, 1)) + x.double().cpu()).cuda()
        ).cpu()
    assert_close(compiled(x), truth, 1e-5)


def test_float16_is_finite_where_dense_is() -> None:
    conv = nn.Conv2d(32, 32, 3, padding=1, device="cuda", dtype=torch.float16).eval()
    with torch.no_grad():
        conv.weight.mul_(1e-2)
    x = torch.full((1, 32, 16, 16), 60000.0, device="cuda", dtype=torch.float16)
    x[0, :, ::2, ::3] *= -1
    for tile in (2, 4):
        y = wsp_compiler.compile(conv, 0, method="dense", tile=tile)(x)
        with torch.no_grad():
            assert torch.isfinite(conv(x)).all()
        assert torch.isfinite(y).all()


def test_nan_and_inf_propagate() -> None:
    model = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()).cuda().eval()
    compiled = wsp_compiler.compile(model, 0, method="dense")
    for value in (float("nan"), float("inf")):
        x = torch.randn(1, 32, 8, 8, device="cuda")
        x[0, 0, 4, 4] = value
        assert not torch.isfinite(compiled(x)[0, :, 3:6, 3:6]).all()


@pytest.mark.parametrize("filters", [64, 128, 256, 512])
def test_fused_kernel_and_its_epilogues(filters: int) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(64, filters, 3, padding=1)

        def forward(self, x: Tensor, identity: Tensor) -> Tensor:
            return F.leaky_relu(self.conv(x) + identity, 0.2)

    block = Block().cuda().half().eval()
    for batch, height, width, method in (
        (1, 14, 14, "bwsp"),
        (32, 28, 28, "wsp"),
        (3, 9, 21, "dense"),
        (2, 7, 7, "fp"),
    ):
        x = (
            torch.randn(batch, 64, height, width, device="cuda")
            .half()
            .contiguous(memory_format=torch.channels_last)
        )
        identity = torch.randn(batch, filters, height, width, device="cuda").half()
        compiled = wsp_compiler.compile(block, 0.8, method=method)
        kept = (
            kept_convolution(x, block.conv, compiled.plan["conv"].keep, 2, (1, 1)) + identity.double().cpu()
        )
        assert_close(compiled(x, identity), F.leaky_relu(kept, 0.2), 2e-3)
        assert "winograd_fused" in compiled.kernel_source("conv")


class Residual(nn.Module):
    """A convolution of 64 channels, an add and an activation."""

    def __init__(self, precision: str, filters: int = 64) -> None:
        super().__init__()
        self.conv = nn.Conv2d(64, filters, 3, padding=1)
        self.cuda().to(DTYPE[precision]).eval()

    def forward(self, x: Tensor, identity: Tensor) -> Tensor:
        return F.leaky_relu(self.conv(x) + identity, 0.2)


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


PRECISION_TILES = list(itertools.product(("fp16", "bf16", "tf32", "fp32"), (2, 4)))


@pytest.mark.parametrize(("precision", "tile"), PRECISION_TILES)
def test_fused_in_every_precision_and_tile(precision: str, tile: int) -> None:
    """Ragged sizes, one pixel, no image, a residual in either format, a misaligned view of the input."""
    block, dtype = Residual(precision), DTYPE[precision]
    options: Any = dict(precision=precision, tile=tile, keep_slower=True)
    compiled = wsp_compiler.compile(block, 0.7, **options)
    for batch, height, width in ((1, 7, 7), (2, 13, 20), (3, 1, 1), (32, 28, 28), (0, 8, 8)):
        x = last(torch.randn(batch, 64, height, width, device="cuda").to(dtype))
        identity = torch.randn(batch, 64, height, width, device="cuda").to(dtype)
        y = compiled(x, identity)
        assert y.shape == (batch, 64, height, width)
        kept = kept_convolution(x, block.conv, compiled.plan["conv"].keep, tile, (1, 1))
        truth = F.leaky_relu(kept + identity.double().cpu(), 0.2)
        assert_close(y, truth, TOLERANCE[precision][tile // 4])
        assert torch.equal(y, compiled(x, last(identity)))
        if batch:
            memory = torch.empty(x.numel() + 8, device="cuda", dtype=dtype)
            moved = memory[2 : 2 + x.numel()].as_strided(x.shape, x.stride()).copy_(x)
            assert moved.data_ptr() % 16
            assert torch.equal(y, compiled(moved, identity))
    assert "winograd_fused" in compiled.kernel_source("conv")


@pytest.mark.parametrize(("precision", "tile"), PRECISION_TILES)
def test_fused_candidates_agree(precision: str, tile: int) -> None:
    """A sample of the configurations, so that every knob runs on the device."""
    from wsp_compiler.codegen.candidates import Candidate
    from wsp_compiler.codegen.cuda_launch import CudaLayer
    from wsp_compiler.codegen.layer import WinogradLayer

    conv = nn.Conv2d(64, 64, 3, padding=1, device="cuda", dtype=DTYPE[precision]).eval()
    compiled = wsp_compiler.compile(conv, 0.7, precision=precision, tile=tile, keep_slower=True)
    x = last(torch.randn(2, 64, 15, 22, device="cuda").to(DTYPE[precision]))
    compiled(x)
    (layer,) = compiled.layers()
    assert isinstance(layer, WinogradLayer)
    (cuda,) = layer._state["layers"].values()
    assert isinstance(cuda, CudaLayer)
    truth = kept_convolution(x, conv, compiled.plan[""].keep, tile, (1, 1))
    tiles = 2 * cuda.spec.tiles_per_image
    fused: list[Candidate] = [c for c in cuda.candidates(tiles) if c.kind == "fused"]
    assert len(fused) >= 4
    for candidate in fused[:: max(1, len(fused) // 8)]:
        cuda.use(candidate, tiles)
        assert_close(cuda.run(x, None), truth, TOLERANCE[precision][tile // 4])


@pytest.mark.parametrize(("precision", "tile"), [("fp16", 4), ("bf16", 2), ("fp32", 4)])
def test_fused_on_two_streams_and_in_a_graph(precision: str, tile: int) -> None:
    block, dtype = Residual(precision), DTYPE[precision]
    compiled = wsp_compiler.compile(block, 0.7, precision=precision, tile=tile, keep_slower=True)
    inputs = [last(torch.randn(4, 64, 28, 28, device="cuda").to(dtype)) for _ in range(2)]
    expected = [compiled(x, x) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    results: list[tuple[Tensor, Tensor]] = []
    for _ in range(20):
        for stream, x, y in zip(streams, inputs, expected, strict=True):
            with torch.cuda.stream(stream):
                results.append((compiled(x, x), y))
    torch.cuda.synchronize()
    assert all(torch.equal(y, truth) for y, truth in results)
    static = inputs[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = compiled(static, static)
    for x, y in zip(inputs, expected, strict=True):
        static.copy_(x)
        graph.replay()
        assert torch.equal(output, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_two_streams(dtype: torch.dtype) -> None:
    conv = nn.Conv2d(64, 64, 3, padding=1, device="cuda", dtype=dtype).eval()
    compiled = wsp_compiler.compile(conv, 0.5)
    inputs = [torch.randn(8, 64, 56, 56, device="cuda", dtype=dtype) for _ in range(2)]
    inputs = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
    expected = [compiled(x) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    results: list[list[Tensor]] = [[], []]
    for _ in range(20):
        for index, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[index].append(compiled(inputs[index]))
    torch.cuda.synchronize()
    for index in range(2):
        assert all(torch.equal(y, expected[index]) for y in results[index])


@pytest.mark.parametrize("compiler", ["nvrtc", "nvcc"])
def test_both_compilers(compiler: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from wsp_compiler.codegen import build

    monkeypatch.setenv("WSP_CUDA_COMPILER", compiler)
    monkeypatch.setenv("WSP_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "_loaded", {})
    conv = nn.Conv2d(32, 32, 3, padding=1, device="cuda", dtype=torch.float16).eval()
    compiled = wsp_compiler.compile(conv, 0.5)
    x = torch.randn(2, 32, 19, 23, device="cuda", dtype=torch.float16)
    assert_close(compiled(x), kept_convolution(x, conv, compiled.plan[""].keep, 2, (1, 1)), 2e-3)
    assert "mma.sync" in compiled.kernel_source("")
    assert len(list(tmp_path.iterdir())) == 3


def _randomise(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.7, 1.3)
            nn.init.normal_(module.bias, std=0.1)
    return model.eval()


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vgg16", "densenet121", "googlenet"])
def test_networks_equal_the_dense_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision = pytest.importorskip("torchvision")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    options = {"aux_logits": False, "init_weights": True} if name == "googlenet" else {}
    model = _randomise(getattr(torchvision.models, name)(weights=None, **options)).cuda()
    x = torch.randn(2, 3, 224, 224, device="cuda")
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(x.double()).cpu()
        single = wsp_compiler.compile(model, 0, method="dense", precision="fp32", example_inputs=(x,))(x)
        assert float((single.double().cpu() - truth).norm() / truth.norm()) < 1e-4
        half = copy.deepcopy(model).half()
        dense = half(x.half())
        ours = wsp_compiler.compile(half, 0, method="dense", example_inputs=(x.half(),))(x.half())
    dense_error = float((dense.double().cpu() - truth).norm() / truth.norm())
    error = float((ours.double().cpu() - truth).norm() / truth.norm())
    assert error < max(1e-2, 2 * dense_error)


def test_cuda_graph_replays_a_compiled_network() -> None:
    torchvision = pytest.importorskip("torchvision")
    model = _randomise(torchvision.models.resnet18(weights=None)).cuda().half()
    model = model.to(memory_format=torch.channels_last)
    static = torch.randn(4, 3, 224, 224, device="cuda", dtype=torch.float16).contiguous(
        memory_format=torch.channels_last
    )
    compiled = wsp_compiler.compile(model, 0.8, example_inputs=(static,))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        compiled(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = compiled(static)
    for _ in range(3):
        fresh = torch.randn_like(static)
        static.copy_(fresh)
        graph.replay()
        replayed = output.clone()
        assert torch.equal(replayed, compiled(fresh))


def test_autocast_and_other_devices() -> None:
    model = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()).cuda().eval()
    x = torch.randn(2, 32, 16, 16, device="cuda")
    compiled = wsp_compiler.compile(model, 0, method="dense")
    with torch.autocast("cuda", dtype=torch.float16), torch.no_grad():
        eager, ours = model(x), compiled(x)
    assert ours.dtype == eager.dtype == torch.float16
    assert float((ours - eager).float().norm() / eager.float().norm()) < 5e-3
    with pytest.raises(wsp_compiler.errors.InputError, match="cpu"):
        compiled(x.cpu())
    with pytest.raises(wsp_compiler.errors.TargetError, match="devices"):
        wsp_compiler.compile(model, target="cuda:99")
    moved = wsp_compiler.compile(
        copy.deepcopy(model).cpu(), 0, method="dense", target="cuda", precision="fp32"
    )
    assert moved(x).device == x.device


@pytest.mark.parametrize("rest", ["eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_resnet18_with_the_rest_fused_as_one_graph(rest: str, dtype: torch.dtype) -> None:
    """Vendor's fused convolutions or torch.compile, captured; against the graph in float64."""
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval().cuda().to(dtype)
    compiled = wsp_compiler.compile(model, 0.6, rest=rest, cuda_graph=True, keep_slower=True)
    exact = copy.deepcopy(compiled.graph_module).double()
    for batch in (2, 3, 2):
        x = torch.randn(batch, 3, 96, 96, device="cuda", dtype=dtype)
        with torch.no_grad():
            expected = exact(x.double())
            error = (compiled(x).double() - expected).norm() / expected.norm()
        assert float(error) < 2e-2


def test_trained_filters_leave_channels_that_the_fused_kernel_takes() -> None:
    """28 of 64 filters are kept; 32 channels are left, 4 of which only emit constants."""
    layers = [m for _ in range(3) for m in (nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Conv2d(64, 3, 3, padding=1)).eval()
    pruned = wsp_compiler.prune(model, 0.57, method="fp", importance="l2")
    x = torch.randn(2, 64, 29, 22)
    with torch.no_grad():
        expected = copy.deepcopy(pruned).double()(x.half().double())
    half = pruned.to("cuda", torch.float16, memory_format=torch.channels_last)
    compiled = wsp_compiler.compile(half, example_inputs=(given := x.cuda().half(),))
    sizes = compiled.record.shrunk.sizes
    assert sizes["0"] == (32, 64)
    assert sizes["2"] == sizes["4"] == (32, 32)
    assert_close(compiled(given), expected, 5e-3)  # four layers
