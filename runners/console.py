"""The terminal: one console for all output, and a progress bar that others can follow."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Without a terminal rich assumes 80 columns, which would break the tables in log files.
# Paths and names may have brackets and colons, which rich would take for its markup and for emoji.
console = Console(width=None if sys.stdout.isatty() else 120, markup=False, emoji=False)

# Called at every step of a bar with its description, the steps done and their total: `progress.json` follows a run so.
watcher: Callable[[str, int, int], None] | None = None


class Bar(Protocol):
    """Advances a progress bar by one step and changes its description."""

    def __call__(self, description: str) -> None: ...


@contextmanager
def progress(description: str, total: int) -> Iterator[Bar]:
    """A bar of `total` steps. Where the console is not a terminal it draws nothing, but the watcher is still called."""
    columns = (
        TextColumn("{task.description:<42}", markup=False),
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
