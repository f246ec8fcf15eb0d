"""Settings as they are typed, quoted for Hydra's grammar and for the shell, and texts without control characters.

A printed command works when it is pasted, and a printed name cannot move the cursor.
"""

import re
import shlex

PLAIN = re.compile(r"[\w./@+-]+(?: [\w./@+-]+)*", re.ASCII)  # Hydra reads such text without quotes
NO_TEXT = re.compile(r"(?i:null|true|false|[+-]?(?:inf|nan))|[+-]?[\d_.]+(?:e[+-]?[\d_]+)?", re.ASCII)  # or reads it so


def setting(name: str, value: object) -> str:
    """One word of a command line for run.py: `'model.path="/models/a (b)"'`."""
    return shlex.quote(f"{name}={hydra_text(str(value))}")


def hydra_text(text: str) -> str:
    """A text as Hydra's grammar and OmegaConf read it back unchanged."""
    if PLAIN.fullmatch(text) and not NO_TEXT.fullmatch(text):
        return text
    escaped = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # otherwise OmegaConf looks for a setting of that name
    # Within quotes Hydra reads backslashes as they are, except before a quote.
    quoted = re.sub(r'(\\*)("|\Z)', lambda found: 2 * found[1] + (r"\"" if found[2] else ""), escaped)
    return f'"{quoted}"'


def printable(text: str) -> str:
    """A text in one line without control characters: `\\n`, `\\x1b` and others that are not printable are escaped."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text
    )
