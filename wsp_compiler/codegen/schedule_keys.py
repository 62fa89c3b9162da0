"""The :class:`LayerKey` of a layer on this device: what its measured times are filed under."""

from __future__ import annotations

import ast
import hashlib
import io
import pathlib
import tokenize
from functools import cache
from typing import Any, cast

import torch

from wsp_compiler.codegen.cache import cache_key, load, store
from wsp_compiler.codegen.schedule_records import LayerKey
from wsp_compiler.codegen.spec import KernelSpec
from wsp_compiler.codegen.targets import CodeTarget
from wsp_compiler.ops import WinogradSite

GENERATORS = {"cuda": ("cuda_*.py", "expressions.py"), "cpu": ("cpu_*.py", "expressions.py")}
"""Files of this folder whose code decides how fast a kernel is."""


@cache
def cache_sizes() -> tuple[int, ...]:
    """Bytes of the CPU's L1 data, L2 and L3 caches, as far as the system tells."""
    sizes: dict[int, int] = {}
    for index in sorted(pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            kind = (index / "type").read_text().strip()
            level = int((index / "level").read_text())
            text = (index / "size").read_text().strip()
            units = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
            size = int(text.rstrip("KM")) * units
        except (OSError, ValueError):
            continue
        if kind != "Instruction":
            sizes[level] = size
    return tuple(sizes[level] for level in sorted(sizes))


def device_name(target: CodeTarget) -> str:
    """GPU name; for a CPU its vector width and cache sizes, since equal ones run equally fast whatever their name."""
    if target.is_cuda:
        return str(torch.cuda.get_device_name(target.device))
    sizes = "+".join(f"{size >> 10}K" for size in cache_sizes()) or "unknown"
    return f"CPU, {target.lanes} lanes, caches {sizes}"


def arch_of(target: CodeTarget) -> str:
    """What a cost model is shared across: devices of one architecture or vector width."""
    return target.arch.rstrip("af") if target.is_cuda else f"cpu{target.lanes}"


def code_only(source: str) -> str:
    """Python source without comments, docstrings and white space: what a digest of its meaning needs."""
    lines = source.encode().split(b"\n")  # ast counts bytes
    cut: list[tuple[int, int, int, int]] = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
            continue
        if isinstance(node.value.value, str):  # a docstring, or a string that says what the line before is
            end = (cast("int", node.end_lineno), cast("int", node.end_col_offset))
            cut.append((node.lineno, node.col_offset, *end))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            start = len(token.line[: token.start[1]].encode())
            cut.append((token.start[0], start, token.end[0], start + len(token.string.encode())))
    for first, start, last, end in sorted(cut, reverse=True):
        kept = lines[first - 1][:start] + lines[last - 1][end:]
        lines[first - 1 : last] = [kept, *[b""] * (last - first)]
    return "".join(b"\n".join(lines).decode().split())


@cache
def generator_digest(device_type: str) -> str:
    """Changes when the code of the kernel generators does; comments and formatting do not count."""
    folder = pathlib.Path(__file__).parent
    paths = [path for pattern in GENERATORS[device_type] for path in sorted(folder.glob(pattern))]
    sources = {path.name: path.read_text(encoding="utf-8") for path in paths}
    key = "digest-" + cache_key(*(part for source in sources.items() for part in source))
    entry = load(key)  # parsing takes long
    if entry is not None and "digest" in entry:
        return entry["digest"].decode()
    digest = hashlib.sha256()
    for name, source in sources.items():
        digest.update(f"{name}\0{code_only(source)}\0".encode())
    short = digest.hexdigest()[:16]
    store(key, {"digest": short.encode()})
    return short


def vendor_version(target: CodeTarget) -> str:
    """Version of PyTorch and of the library that runs its convolutions."""
    if target.is_cuda:
        return f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"
    return f"torch {torch.__version__}"


def _padded(counts: list[int]) -> tuple[int, int]:
    """(mean, largest), rounded up to multiples of 8."""
    mean = -(-sum(counts) // len(counts))
    return (-(-mean // 8) * 8, -(-max(counts) // 8) * 8)


def balanced_block(site: WinogradSite) -> int:
    """The smallest filter group, a multiple of 8 or n, that keeps equally many rows everywhere; 0 if none."""
    positions, n = site.row_offset.numel() - 1, site.bias.numel()
    kept = torch.zeros((positions, n), dtype=torch.int32)
    counts = site.row_offset.diff().long().cpu()
    kept[torch.repeat_interleave(counts), site.rows.long().cpu()] = 1
    for size in (*range(8, n, 8), n):
        if n % size == 0:
            groups = kept.view(positions, n // size, size).sum(2)
            if int(groups.min()) == int(groups.max()):
                return size
    return 0


def epilogue_of(spec: KernelSpec) -> str:
    """The activation, and "+residual"."""
    return spec.activation + "+residual" * spec.residual


@cache
def _multiprocessors(device: torch.device) -> int:
    return int(cast("Any", torch.cuda).get_device_properties(device).multi_processor_count)


def _common(spec: KernelSpec, batch: int, target: CodeTarget) -> dict[str, Any]:
    return dict(
        device=device_name(target),
        arch=arch_of(target),
        threads=_multiprocessors(target.device) if target.is_cuda else torch.get_num_threads(),
        filters=spec.filters,
        channels=spec.channels,
        height=spec.height,
        width=spec.width,
        padding=spec.padding,
        batch=batch,
        dtype=spec.dtype,
        precision=spec.precision,
    )


def layer_key(spec: KernelSpec, site: WinogradSite, batch: int, target: CodeTarget) -> LayerKey:
    """The key of a lowered layer for a batch size."""
    rows: list[int] = cast("Any", site.row_offset.diff()).tolist()
    columns: list[int] = cast("Any", site.column_offset.diff()).tolist()
    return LayerKey(
        **_common(spec, batch, target),
        input_channels_last=spec.input_channels_last,
        output_channels_last=spec.output_channels_last,
        tile=spec.tile,
        rows=_padded(rows),
        columns=_padded(columns),
        block=balanced_block(site),
        epilogue=epilogue_of(spec),
        generator=generator_digest(target.device.type),
    )


def vendor_key(spec: KernelSpec, batch: int, target: CodeTarget) -> LayerKey:
    """The key of the vendor's dense convolution in place of a lowered layer, in the faster memory format."""
    return LayerKey(
        **_common(spec, batch, target),
        input_channels_last=True,
        output_channels_last=True,
        tile=0,
        rows=(0, 0),
        columns=(0, 0),
        block=0,
        epilogue=epilogue_of(spec),
        generator=vendor_version(target),
    )
