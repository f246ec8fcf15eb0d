"""`run.log` in a run's folder: what a bug report needs, one time stamp per line, appended to when a run goes on.

Versions, machine, command line, messages, warnings, progress, and the traceback of a failure. No result depends on it, and
it holds no secrets: values of environment variables that are named like one, tokens, and passwords in addresses are hidden.
"""

import logging
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from runners import console
from runners.quoting import printable

RUN_LOG = "run.log"
SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|(?:^|_)KEY(?:$|_)|APIKEY", re.IGNORECASE)
# Tokens of the model hub, of GitHub and of other services; a password in the address of a server or a proxy.
SECRETS = re.compile(
    r"\b(?:hf_|sk-|gh[pousr]_|github_pat_|wandb_v1_)\w{16,}|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"
    r"|(?i:(?<=token=)|(?<=password=)|(?<=key=)|(?<=Bearer ))[^\s&'\"]{8,}"
)
SHORTEST_SECRET = 8  # a shorter value, such as KEY=1, would be struck out of everything
HIDDEN = "***"


@contextmanager
def run_log(folder: Path) -> Iterator[Callable[[str], None]]:
    """Keep all messages, warnings and lines on progress as long as the context lasts.

    Yields:
        A function that adds a text of any number of lines.
    """

    def add(text: str) -> None:
        append(folder, text)

    handler = _Handler(folder)
    scribe, console.scribe = console.scribe, add
    show, warnings.showwarning = warnings.showwarning, _also_to(folder, warnings.showwarning)
    logging.getLogger().addHandler(handler)
    try:
        yield add
    finally:
        logging.getLogger().removeHandler(handler)
        console.scribe, warnings.showwarning = scribe, show


def append(folder: Path, text: str, level: str = "INFO") -> None:
    """Add a text to the log of the run in a folder. A disk that is full ends no run here."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S%z")
    lines = (f"{stamp} {level:<7} {printable(line)}".rstrip() for line in without_secrets(text).splitlines())
    with suppress(OSError), (folder / RUN_LOG).open("a", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in lines))


def without_secrets(text: str) -> str:
    """A text in which secrets are replaced by `***`."""
    values = {value for name, value in os.environ.items() if SECRET_NAMES.search(name)}
    for value in sorted(values, key=len, reverse=True):  # the longest first, as one may be part of another
        if len(value) >= SHORTEST_SECRET:
            text = text.replace(value, HIDDEN)
    return SECRETS.sub(HIDDEN, text)


class _Handler(logging.Handler):
    """Appends what is logged to the log of the run in a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(Exception):  # a message that cannot be formatted must not end a run
            append(self._folder, self.format(record), record.levelname)


def _also_to(folder: Path, show: Callable[..., None]) -> Callable[..., None]:
    """Show a warning of Python as before, and keep it."""

    def keep(message: Warning | str, category: type[Warning], filename: str, line: int, *rest: Any) -> None:
        append(folder, f"{filename}:{line}: {category.__name__}: {message}", "WARNING")
        show(message, category, filename, line, *rest)

    return keep
