"""The README's code runs as printed, and its commands are the ones CI uses."""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

import pytest
import torch

from benchmarks.results import geomean

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run_in_order() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 3
    scope: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    x = torch.randn(1, 32, 9, 9)
    network, faster = scope["network"], scope["faster"]
    with torch.no_grad():
        expected = torch.nn.functional.gelu(network[0](x), approximate="tanh")
    torch.testing.assert_close(faster(x), expected, rtol=1e-4, atol=1e-5)
    assert scope["compiled"].plan["layer1.0.conv1"].pr == 0.5
    assert "skipped by PruneRule" in scope["compiled"].report()


def test_the_custom_pass_is_short() -> None:
    block = README.split("<!-- custom pass -->")[1].split("```python\n")[1].split("```")[0]
    body = block.split("@dataclass")[1].split("\npasses =")[0].strip().splitlines()
    assert len(body) <= 15


def test_there_are_two_set_up_commands_and_ci_uses_the_second() -> None:
    commands = re.findall(r"```bash\n(python3 -m venv .*?)\n```", README, flags=re.DOTALL)
    assert len(commands) == 2
    assert "examples.denoise_photo" in commands[0]
    assert "pytest" in commands[1]
    assert "<!-- test command -->" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def rows(name: str) -> list[dict[str, Any]]:
    loaded: list[dict[str, Any]] = json.loads((ROOT / "benchmarks" / "results" / name).read_text())["rows"]
    return loaded


@pytest.mark.parametrize(
    ("name", "baselines"),
    [
        ("conv_layers_h100_fp16.json", ["cudnn_fp16"]),
        ("conv_layers_h100_fp16.json", ["cudnn_winograd"]),
        ("conv_layers_h100_fp16_n1.json", ["cudnn_fp16"]),
        ("conv_layers_h100_fp32.json", ["cudnn_fp32", "cudnn_winograd"]),
        ("conv_layers_h100_tf32.json", ["cudnn_tf32", "cudnn_winograd"]),
        ("conv_layers_h100_tf32_n1.json", ["cudnn_tf32", "cudnn_winograd"]),
        ("conv_layers_h100_fp32_n1.json", ["cudnn_fp32", "cudnn_winograd"]),
        ("conv_layers_cpu_fp32.json", ["torch_fp32"]),
    ],
)
def test_quoted_layer_ratios_are_those_of_the_results(name: str, baselines: list[str]) -> None:
    ratios = [min(row["ratios"][label] for label in baselines) for row in rows(name)]
    assert len(ratios) == (8 if "cpu" in name or "n1" in name else 12)
    quoted = f"| {geomean(ratios):.2f}x | {min(ratios):.2f}x | {name} |"
    assert quoted in README, quoted


@pytest.mark.parametrize("network", ["resnet18", "vgg16"])
@pytest.mark.parametrize("baseline", ["eager", "torch_compile"])
def test_quoted_network_ratios_are_those_of_the_results(baseline: str, network: str) -> None:
    found = {row["name"]: row["ratios"][baseline] for row in rows("networks_h100_fp16.json")}
    quoted = " | ".join(f"{found[f'{network} N=32 pr=0.8 {rest}']:.2f}x" for rest in ("inductor", "eager"))
    lines = [line for line in README.splitlines() if line.startswith(f"| {network}: ")]
    assert any(f"| {quoted} | networks_h100_fp16.json |" in line for line in lines), quoted


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_quoted_paper_ratios_are_those_of_the_results(dtype: str) -> None:
    (row,) = (row for row in rows(f"paper_table3_h100_{dtype}.json") if row["pr"] == 0.84)
    quoted = f"{row['strongest_ratio']:.2f}x in {dtype} (`paper_table3_h100_{dtype}.json`)"
    assert quoted in " ".join(README.split()), quoted


def test_quoted_small_residual_networks_are_those_of_the_results() -> None:
    found = [row["strongest_ratio"] for row in rows("paper_table2_h100_fp16.json") if row["pr"] == 0.84]
    quoted = ", ".join(f"{ratio:.2f}x" for ratio in found) + " (`paper_table2_h100_fp16.json`)"
    assert quoted in " ".join(README.split()), quoted


def test_quoted_first_calls_are_those_of_the_results() -> None:
    cold, warm = (row["first_result_s"] for row in rows("first_call_h100.json"))
    quoted = f"{cold:.1f} s on a new machine, {warm:.1f} s with cached kernels (`first_call_h100.json`)"
    assert quoted in " ".join(README.split()), quoted


@pytest.mark.parametrize("name", ["", "_n8", "_dense"])
def test_quoted_ratios_over_the_strongest_peer_are_those_of_the_results(name: str) -> None:
    ratios = [row["strongest_ratio"] for row in rows(f"conv_layers_cpu_fp32{name}.json")]
    assert f"| {geomean(ratios):.2f}x | {min(ratios):.2f}x | conv_layers_cpu_fp32{name}.json |" in README


STRONGEST = {"denoiser": "ncnn", "vgg16": "ncnn", "vgg16_whole": "ncnn", "resnet18": "onnxruntime"}
"""The peers that the README names."""


@pytest.mark.parametrize("network", STRONGEST)
def test_quoted_cpu_network_ratios_are_those_of_the_results(network: str) -> None:
    (row,) = rows(f"cpu_networks_{network}.json")
    assert row["strongest"] == STRONGEST[network]
    assert f"{row['strongest_ratio']:.2f}x (`cpu_networks_{network}.json`)" in " ".join(README.split())


def test_quoted_main_job_figures_are_those_of_the_results() -> None:
    found = {row["label"]: row for row in rows("denoise_photo_cpu.json")}
    text = " ".join(README.split())
    eager, dense, pruned = (
        found[key] for key in ("PyTorch eager, dense", "compiled, pr=0", "compiled, pr=0.8")
    )
    assert (
        f"PyTorch {eager['median_ms']:.0f} ms, compiled {dense['median_ms']:.0f} ms at pr=0 and "
        f"{pruned['median_ms']:.0f} ms at pr=0.8"
    ) in text
    for row in found.values():
        assert f"{row['psnr_db']:.2f}" in text


def test_no_placeholder_is_left() -> None:
    assert not re.search(r"@[a-z_.0-9]+@", README)


ACCURACY = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8").replace("**", "")


def test_quoted_losses_of_fine_tuned_networks_are_those_of_the_results() -> None:
    found = rows("denoiser_finetuning_h100.json")
    before, after = (
        {row["name"]: f"{row['mean_drop'][when]:.2f}" for row in found}
        for when in ("calibrated", "fine-tuned")
    )
    again = {"wsp80": f"WSP lost {after['wsp80']} dB", "fp71 rate 0.001": f"FP {after['fp71 rate 0.001']} dB"}
    for name in after:
        assert again.get(name, f"| {before[name]} -> {after[name]} ") in " ".join(ACCURACY.split()), name
    assert f"loses {after['wsp80 rate 0.003']} dB, without 90%" in " ".join(README.split())
    assert f"multiplications {after['fp71 rate 0.003']} dB" in " ".join(README.split())


def test_quoted_plans_with_both_numbers_are_those_of_the_results() -> None:
    h100, cpu = (
        {row["name"]: row for row in rows(f"one_plan_denoiser_{device}.json")} for device in ("h100", "cpu")
    )
    assert [name for name, row in h100.items() if row["chosen"]] == ["denoiser_filters_pr80"]
    for name, row in h100.items():
        assert (row["pr"], row["chosen"]) == (cpu[name]["pr"], cpu[name]["chosen"])
        quoted = f"| {row['pr']:.2f} | {row['loss']:.2f} dB"
        speeds = f"| {row['strongest_ratio']:.2f}x | {cpu[name]['strongest_ratio']:.2f}x |"
        assert any(quoted in line and speeds in line for line in ACCURACY.splitlines()), name
