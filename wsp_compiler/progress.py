"""Progress bars on a terminal; nothing elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

Advance = Callable[..., None]
"""Takes one step; an argument replaces the bar's text."""

_shown: list[Progress] = []


@contextlib.contextmanager
def progress(description: str, total: int, *, enabled: bool = True) -> Generator[Advance]:
    """A bar on stderr, gone when done. A bar within another stands below it.

    Args:
        description: text in front of the bar.
        total: number of steps.
        enabled: False shows nothing.

    Yields:
        What to call at every step, with or without a new text.
    """
    with _display(enabled) as display:
        task = display.add_task(description, total=total)

        def advance(text: str | None = None) -> None:
            display.update(task, description=text, advance=1)

        try:
            yield advance
        finally:
            display.remove_task(task)


@contextlib.contextmanager
def _display(enabled: bool) -> Generator[Progress]:
    """The display that is on, for rich shows one at a time, else a new one."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not (enabled and console.is_terminal):
        yield Progress(console=console, disable=True)
        return
    if _shown:
        yield _shown[0]
        return
    with Progress(console=console, transient=True) as made:
        _shown.append(made)
        try:
            yield made
        finally:
            _shown.clear()
