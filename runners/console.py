"""The console, and a progress bar on it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(width=None if sys.stdout.isatty() else 120)

watcher: Callable[[str, int, int], None] | None = None  # told every step of a bar: what was done, how many of how many


class Bar(Protocol):
    """A progress bar, one step at a time."""

    def __call__(self, description: str) -> None: ...


@contextmanager
def progress(description: str, total: int) -> Iterator[Bar]:
    """A bar of `total` steps; silent where the console is not a terminal."""
    columns = (
        TextColumn("{task.description:<42}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        done = 0

        def step(description: str) -> None:
            nonlocal done
            done += 1
            bar.update(task, completed=done, description=description)
            if watcher is not None:
                watcher(description, done, total)

        yield step
