"""The method of a compressed-tensors checkpoint, from the recipe that llm-compressor leaves beside it (`recipe.yaml`).

compressed-tensors is a format and names no method. A recipe lists modifiers, such as `GPTQModifier:`, in their order.
"""

import re
from pathlib import Path

FILE = "recipe.yaml"
MOST = 100_000  # characters that are looked at
# A key of the file. It is not parsed: a file of references to itself can be made to take forever.
MODIFIER = re.compile(r"^[ \t-]*(\w{1,40})Modifier[ \t]*:", re.MULTILINE)
ROUNDING = {"quantization": "rtn"}  # QuantizationModifier rounds to nearest


def method_of(folder: Path) -> str | None:
    """The methods of a recipe, joined by +, in lower case; None: there is no recipe, or it names none."""
    try:
        with (folder / FILE).open(encoding="utf-8", errors="replace") as opened:
            text = opened.read(MOST)
    except OSError:
        return None
    found = [match.group(1).lower() for match in MODIFIER.finditer(text)]
    return "+".join(dict.fromkeys(ROUNDING.get(name, name) for name in found)) or None
