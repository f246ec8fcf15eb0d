"""Names that become folders and files: of studies, models and methods, of texts and tasks."""

import re
import unicodedata

from runners.errors import InputError

MAX_BYTES = 120  # in UTF-8; a file name may have 255, and runs add bits and a digest, reports a measure and an ending


def check_name(what: str, name: str) -> str:
    """The name, if it is one component of a path. Any other would put results outside the folder that they belong to.

    Args:
        what: the setting that has the name, or words for it; for the sentence.

    Raises:
        InputError: the name is empty, too long, made of dots, or has a separator or a control character.
    """
    if fault := _fault(name):
        remedy = f"; set {what}=NAME" if re.fullmatch(r"[\w.]+", what) else ""
        raise InputError(f"{what} must be the name of a folder, not {_shown(name)}: {fault}{remedy}")
    return name


def _fault(name: str) -> str | None:
    if not name.strip():
        return "it is empty"
    if "/" in name or "\\" in name:
        return "it has a separator of folders"
    if not name.strip("."):
        return "dots alone are another folder"
    # Cc: control characters. Cs: bytes of the command line that are no UTF-8, which cannot be written to a JSON file.
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        return "it has a control character, or one that is not UTF-8"
    size = len(name.encode())
    return f"it has {size} bytes of UTF-8, more than {MAX_BYTES}" if size > MAX_BYTES else None


def _shown(name: str) -> str:
    """The name in one line of a message."""
    return repr(name if len(name) <= MAX_BYTES else name[:40] + "...")
