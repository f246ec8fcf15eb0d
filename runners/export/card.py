"""What an export says of itself: `README.md` for people, `export.json` for programs."""

import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runners.export.writer import Written
from runners.kept.run import KeptRun
from runners.results import metrics
from runners.run.environment import versions
from runners.storage.files import write

CARD, FACTS = "README.md", "export.json"


@dataclass(frozen=True)
class Check:
    """Perplexity on a text, of the run and of what was written and loaded again by a reader."""

    text: str
    before: float
    after: float
    reader: str

    @property
    def is_equal(self) -> bool:
        """To the last digit that tables print."""
        return f"{self.before:.2f}" == f"{self.after:.2f}"

    def words(self) -> str:
        """A sentence."""
        how = f"loaded again with {self.reader}, its perplexity on {self.text} is"
        if self.before == self.after:
            return f"{how} the run's: {self.after:.4f}"
        digits = "" if self.is_equal else ": not the same to the last digit that tables print"
        return f"{how} {self.after:.4f}, in the run {self.before:.4f}{digits}"


def write_card(kept: KeptRun, folder: Path, run: Path, name: str, written: Written, checked: Check | None) -> None:
    """Write both files.

    Args:
        folder: of the export.
        run: the run's folder, as it was typed.
        name: of the format.
        written: its size, and what was folded.
        checked: None: it was not loaded again.
    """
    command = f"python -m runners.export {shlex.quote(str(run))} format={name} to=FOLDER"
    if checked is not None:
        command += f" text={checked.text}"
    facts = _facts(kept) | {"format": name, "bytes": written.size, "command": command, "versions": versions()}
    if written.folded:
        facts["folded"] = list(written.folded)
    facts["check"] = None if checked is None else asdict(checked)
    write(folder / FACTS, json.dumps(facts, indent=2) + "\n")
    write(folder / CARD, _card(kept, facts, checked))


def _facts(kept: KeptRun) -> dict[str, Any]:
    names = ("model", "method", "bits", "group_size", "symmetric", "act_order", "seed", "digest")
    names += (metrics.CALIBRATION, metrics.BITS_PER_WEIGHT, metrics.CHECKPOINT_SHA256)
    return {name: kept.metrics[name] for name in names if name in kept.metrics}


def _card(kept: KeptRun, facts: dict[str, Any], checked: Check | None) -> str:
    grid = f"{metrics.bits_words(facts['bits'])}, {metrics.grid_words(kept.metrics)}"
    rows = "".join(f"| {name.replace('/', ' ')} | {facts[name]} |\n" for name in _facts(kept))
    check = "It was not loaded again after it was written." if checked is None else _sentence(checked)
    return f"""# {facts["model"]}, quantized with {facts["method"]} to {grid}

Made by QuantEase Bench from a finished run, in the format `{facts["format"]}`:

```
{facts["command"]}
```

{check}{_folded(facts.get("folded", []))}

| of the run | |
|---|---|
{rows}
The weights are those of the original model but for the quantized layers; its license holds for them. `export.json` has the
same facts for programs, with the versions of the libraries.
"""


def _folded(words: list[str]) -> str:
    """What was done with column scales, for which the format has no place."""
    if not words:
        return ""
    moved = "".join(f"- of {each}\n" for each in words)
    return f"""

The format has no place for the scales of input columns. They are folded into what stands before, which is exact but for the
rounding of the weights, biases and scales that take them:

{moved}"""


def _sentence(checked: Check) -> str:
    words = checked.words()
    return f"{words[0].upper()}{words[1:]}."
