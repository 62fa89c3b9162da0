"""The README's code runs as printed, and its commands are the ones CI uses."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import torch

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
