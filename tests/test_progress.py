"""progress: silent without a terminal, one display on it however bars nest."""

from __future__ import annotations

import io

import pytest
import rich.console

from wsp_compiler import progress as module
from wsp_compiler.progress import progress


def test_nothing_is_written_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("working", 2) as advance:
        advance()
        advance("at something else")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ""


@pytest.mark.parametrize("outer", [True, False])
def test_bars_nest_on_a_terminal(monkeypatch: pytest.MonkeyPatch, outer: bool) -> None:
    written = io.StringIO()
    real = rich.console.Console

    def console(stderr: bool) -> rich.console.Console:
        return real(file=written, force_terminal=True, width=80)

    monkeypatch.setattr(rich.console, "Console", console)
    shown = module.__dict__["_shown"]
    with progress("outer work", 2, enabled=outer) as one:
        one()
        with progress("inner work", 3) as two:
            two("inner step")
            assert len(shown) == 1
            assert len(shown[0].tasks) == 1 + outer
            assert shown[0].tasks[-1].completed == 1
            assert shown[0].tasks[-1].description == "inner step"
        assert len(shown) == outer
        one()
    assert shown == []
    assert "inner work" in written.getvalue()
    assert ("outer work" in written.getvalue()) == outer


def test_an_error_leaves_no_display() -> None:
    with pytest.raises(RuntimeError, match="stop"), progress("working", 1):
        raise RuntimeError("stop")
    assert module.__dict__["_shown"] == []
