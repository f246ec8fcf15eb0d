"""The terminal: one console for all output, and the progress of a stage, which others can follow.

On a terminal a stage is a bar. Elsewhere (nohup, Slurm, a pipe) it is plain lines, one for each part that has ended:
`quantize gptq, 3 bits: block 3 of 24, 41 s, about 14 min left`.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import fmean

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from runners.quoting import printable

# Without a terminal rich assumes 80 columns, which would break the tables in log files.
# Paths and names may have brackets and colons, which rich would take for its markup and for emoji.
console = Console(width=None if sys.stdout.isatty() else 120, markup=False, emoji=False)

# Called at every step of a stage with its description, the steps done and their total: `progress.json` follows a run so.
watcher: Callable[[str, int, int], None] | None = None
# Called with every line on progress, also where the terminal shows a bar instead: `run.log` keeps them.
scribe: Callable[[str], None] | None = None

PART_SECONDS = 1.0  # between two lines of parts: a small model has a block done in milliseconds
STEP_SECONDS = 30.0  # from the last line on, until a step within a part is worth one


class Pace:
    """How long the rest of a stage will take, from those of its parts, such as decoder blocks, that were measured here.

        seconds left = parts left * mean seconds of the parts measured

    Parts of unlike size, such as texts, are counted in what they are made of, such as windows.

    The first part is left out as soon as there is another: compilers and caches warm up in it, and in a run that is resumed
    it holds the way of the activations through all blocks that were finished before.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = clock()
        self._seconds: list[float] = []
        self._parts_left = 0
        self._is_resumed = False

    def finish(self, done: int, total: int, size: int = 1) -> float:
        """A part has ended, the last of `done` in `total`, which counts as `size` of them; returns its seconds."""
        now = self._clock()
        if not self._seconds:
            self._is_resumed = done > size  # the parts before were finished by an earlier process
        seconds = now - self._last
        self._seconds.append(seconds / size)
        self._last, self._parts_left = now, total - done
        return seconds

    @property
    def left(self) -> float | None:
        """Seconds until the last part will have ended, as of now; None as long as no part tells."""
        measured = self._seconds[1:] or ([] if self._is_resumed else self._seconds)
        if not measured:
            return None
        return max(0.0, self._parts_left * fmean(measured) - (self._clock() - self._last))


class Bar:
    """The progress of one stage: of its steps, and of its parts, such as decoder blocks, where it has any.

    Args:
        title: of the stage, in front of every line.
        total: steps.
        draw: shows the number of steps done and what the last one was; None: nothing is to be shown, or said.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        title: str = "",
        total: int = 0,
        draw: Callable[[int, str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.done = 0
        self._title, self._total, self._draw, self._clock = title, total, draw, clock
        self._start = self._said = self._said_of_part = clock()
        self._held: str | None = None
        self._pace: Pace | None = None
        self._then = ""

    def __call__(self, description: str, done: int | None = None) -> None:
        """A step is done, with what it was; or the steps until `done`."""
        self.done = self.done + 1 if done is None else done
        if self._draw is None:
            return
        self._draw(self.done, description)
        if watcher is not None:
            watcher(description, self.done, self._total)
        words = "" if description == self._title else f"{' '.join(description.split())}, "  # not the same twice
        what = f"{words}{self.done} of {self._total} steps"
        if self._pace is None:  # a stage without parts: its last line is shown when it ends
            seconds = self._clock() - self._start
            left = seconds / max(self.done, 1) * (self._total - self.done)
            self._say(f"{what}, {duration(seconds)}", left, self._clock() - self._said >= STEP_SECONDS)
        elif self._clock() - self._said >= STEP_SECONDS:
            self._say(what, self._pace.left)

    def begin(self, then: str = "") -> None:
        """Parts follow. The time left is of these parts alone; `then` names what of the run comes after them."""
        self.flush()
        self._pace, self._then = Pace(self._clock), f", then {then}" if then else ""

    def finish(self, part: str, done: int, total: int, size: int = 1) -> None:
        """A part has ended, such as `block 3 of 24`: the last of `done` in `total` (see `Pace.finish` for `size`)."""
        assert self._pace is not None, "begin() comes first"
        seconds = self._pace.finish(done, total, size)
        left = self._pace.left if done < total else None
        is_due = self._clock() - self._said_of_part >= PART_SECONDS or done == total
        self._said_of_part = self._clock() if is_due else self._said_of_part
        self._say(f"{part}, {duration(seconds)}", left, is_due)

    def flush(self) -> None:
        """Show the line that came too soon after the one before it: the last one of a stage is always shown."""
        if self._held is not None:
            self._emit(self._held)

    def _say(self, what: str, left: float | None, is_due: bool = True) -> None:
        if self._draw is None:
            return
        rest = f", about {duration(left)} left{self._then}" if left else ""
        line = printable(f"{self._title}: {what}{rest}")
        if is_due:
            self._emit(line)
        else:
            self._held = line

    def _emit(self, line: str) -> None:
        self._held, self._said = None, self._clock()
        if not is_live():
            console.print(line, highlight=False, soft_wrap=True)
        if scribe is not None:
            scribe(line)


@contextmanager
def progress(title: str, total: int) -> Iterator[Bar]:
    """The progress of a stage of `total` steps: a bar on a terminal, else lines."""
    columns = (
        TextColumn("{task.description:<42}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not is_live()) as drawn:
        task = drawn.add_task(title, total=total)
        bar = Bar(title, total, lambda done, words: drawn.update(task, completed=done, description=words))
        try:
            yield bar
        finally:
            bar.flush()


def is_live() -> bool:
    """Whether a bar can be drawn. FORCE_COLOR makes rich take a file for a terminal, and a dumb one cannot go back."""
    return console.is_terminal and not console.is_dumb_terminal and console.file.isatty()


def duration(seconds: float) -> str:
    """In the largest unit that still shows two digits: `45 s`, `12 min`, `3 h 20 min`; below 10 s `4.2 s`."""
    minutes = round(seconds / 60)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
