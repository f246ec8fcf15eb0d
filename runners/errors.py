"""Errors that the user can correct, and the exit codes of all commands."""

import difflib
from collections.abc import Iterable

FAILED, WRONG_INPUT, INTERRUPTED = 1, 2, 130  # 130: 128 + SIGINT, as shells count


class InputError(Exception):
    """Something given is wrong. The message is a sentence: what, where (the key, the file, the layer), what to do."""


class NoRoom(InputError):
    """A disk is full, over its quota or broken. Nothing is wrong with the run: the same command goes on with it."""


class MissingData(InputError):
    """A data set is neither in the data root nor on the hub. What does not need it can still run."""


def known_names(name: str, known: Iterable[str]) -> str:
    """For the sentence on a name that does not exist: `did you mean night? There are night, tiny`."""
    options = list(known)
    close = difflib.get_close_matches(name, options, n=1)
    there = f"here are {', '.join(options) or 'none'}"
    return f"did you mean {close[0]}? T{there}" if close else f"t{there}"
