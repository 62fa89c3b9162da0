"""Keys: equal for layers that run equally fast, different for others."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from wsp_compiler.codegen import schedule_keys as module
from wsp_compiler.codegen.schedule_keys import (
    arch_of,
    balanced_block,
    cache_sizes,
    code_only,
    device_name,
    epilogue_of,
    generator_digest,
    layer_key,
    vendor_key,
)
from wsp_compiler.codegen.targets import CodeTarget, cpu_target
from wsp_compiler.ops import WinogradSite
from wsp_compiler.pruning.balanced import BalancedWinogradStructured
from wsp_compiler.pruning.importance import l2
from wsp_compiler.winograd import transform_weight

from .emulation import make_case

CUDA = CodeTarget(torch.device("cuda", 0), "sm_90a", 0)


def site_with_block(n: int, block: int | None, pr: float = 0.5) -> WinogradSite:
    U = transform_weight(torch.randn(n, 8, 3, 3), 2)
    site = WinogradSite(BalancedWinogradStructured(block=block).keep(U, pr, "row", l2))
    site.fill(U, None)
    return site


@pytest.mark.parametrize(("block", "expected"), [(8, 8), (16, 16), (32, 32), (None, 96), (48, 48)])
def test_the_group_that_is_balanced(block: int | None, expected: int) -> None:
    assert balanced_block(site_with_block(96, block)) == expected


def test_nothing_is_balanced_in_wsp() -> None:
    assert balanced_block(make_case(method="wsp", filters=64).site) == 0


def test_a_cpu_is_known_by_what_makes_it_fast() -> None:
    target = CodeTarget(torch.device("cpu"), "znver4", 16)
    name = device_name(target)
    assert name.startswith("CPU, 16 lanes, caches ")
    assert "znver" not in name
    assert all(f"{size >> 10}K" in name for size in cache_sizes())
    assert arch_of(target) == "cpu16"
    assert arch_of(CUDA) == "sm_90"


def test_the_key_of_a_layer() -> None:
    case = make_case(filters=40, channels=24, pr=0.8, activation="relu", residual=True, output_last=False)
    target = cpu_target()
    key = layer_key(case.spec, case.site, 3, target)
    assert (key.filters, key.channels, key.height, key.width, key.batch) == (40, 24, 7, 9, 3)
    assert (key.rows, key.columns, key.block, key.tile) == ((8, 8), (24, 24), 40, 2)
    assert (key.input_channels_last, key.output_channels_last) == (True, False)
    assert key.epilogue == epilogue_of(case.spec) == "relu+residual"
    assert (key.threads, key.arch) == (torch.get_num_threads(), f"cpu{target.lanes}")
    assert key == layer_key(case.spec, case.site, 3, target)
    vendor = vendor_key(case.spec, 3, target)
    assert (vendor.tile, vendor.rows, vendor.block, vendor.epilogue) == (0, (0, 0), 0, "relu+residual")
    assert torch.__version__ in vendor.generator
    other = dataclasses.replace(case.spec, tile=4, columns_pruned=True)
    assert vendor_key(other, 3, target) == vendor  # the dense convolution has no tile


def test_weights_do_not_matter_but_uneven_rows_do() -> None:
    options: dict[str, Any] = dict(filters=64, channels=16, pr=0.75)
    target = cpu_target()
    keys = {layer_key((case := make_case(**options)).spec, case.site, 1, target) for _ in range(3)}
    assert len(keys) == 1
    uneven = make_case(**options, method="wsp")
    key = layer_key(uneven.spec, uneven.site, 1, target)
    assert key.block == 0
    assert key.rows[0] <= key.rows[1]


def test_code_only() -> None:
    source = '"""Über"""\nx = 1  # ä comment\n\n\ndef f(a):\n    """Doc\n    string."""\n    return "# no, ü" + a\n'
    assert code_only(source) == 'x=1deff(a):return"#no,ü"+a'
    assert code_only(source.replace("comment", "other").replace("Doc", "Text")) == code_only(source)
    assert code_only(source.replace("x = 1", "x = 2")) != code_only(source)


def test_the_digest_follows_the_generators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "expressions.py").write_text("a = 1\n")
    (tmp_path / "cpu_one.py").write_text("b = 2\n")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "schedule_keys.py"))
    generator_digest.cache_clear()
    first = {kind: generator_digest(kind) for kind in ("cpu", "cuda")}
    (tmp_path / "cpu_one.py").write_text("b = 2  # two\n")
    generator_digest.cache_clear()
    assert {kind: generator_digest(kind) for kind in first} == first
    (tmp_path / "cpu_one.py").write_text("b = 3\n")
    generator_digest.cache_clear()
    assert generator_digest("cpu") != first["cpu"]
    assert generator_digest("cuda") == first["cuda"]
    generator_digest.cache_clear()
