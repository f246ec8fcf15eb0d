"""Formats in and out, with the perplexity before and after: what `results/formats/` holds.

`python -m tests.format_table` quantizes the bundled model on a CPU once for each row, writes it in a format, loads it again
and measures: some minutes. *Out* is `python -m runners.export`; *in* is `method=stored` on a checkpoint in another tool's
layout. Before is the perplexity of the run that made the codes, as floating-point weights; of a GGUF file that of what the
package gguf makes of it.
"""

import csv
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from runners.arguments import invoke
from runners.config.command_line import check
from runners.export import __main__ as export
from runners.export.card import FACTS
from runners.results import metrics
from runners.run.experiment import run_cell
from tests.conftest import PROJECT
from tests.formats.writers import write_packed
from tests.models.test_gguf import write_gguf

TABLE = PROJECT / "results" / "formats"
CSV, PAGE = "formats.csv", "README.md"
BUNDLED, BLOCKS = PROJECT / "runners" / "tiny", "model.decoder.layers."
TEXT = "stdlib_docs"
WINDOWS = 16  # of 512 tokens: what is compared is equal or not on any text
FIXED = (
    "calibration.num_sequences=8",
    f"evaluation={TEXT}",
    f"evaluation.texts.{TEXT}.max_windows={WINDOWS}",
    "evaluation.agreement=false",
    "device=cpu",
    "tracker=none",
)
Words = tuple[str, ...]

FOUR = ("method=gptq", "bits=4", "group_size=64")
EIGHT = ("method=rtn", "bits=8", "group_size=64")
NF4 = ("method=rtn", "grid=nf4", "group_size=64", "scale_bits=32")
AWQ = ("method=awq", "bits=4", "group_size=64")
HALF = (*AWQ, "model.dtype=bfloat16")  # the bundled model is run in float32
OUT: list[tuple[str, Words]] = [
    ("dense", ("method=gptq", "bits=3")),
    ("dense", ("method=quantease_outlier", "bits=3")),
    ("dense", ("method=spqr", "bits=3")),
    ("dense", ("method=gptq", "grid=mxfp4")),
    ("dense", AWQ),
    ("compressed_tensors", ("method=gptq", "bits=2", "group_size=64")),
    ("compressed_tensors", ("method=gptq", "bits=3")),
    ("compressed_tensors", FOUR),
    ("compressed_tensors", (*FOUR, "symmetric=true")),
    ("compressed_tensors", ("method=rtn", "bits=8", "symmetric=true")),
    ("compressed_tensors", AWQ),
    ("compressed_tensors", HALF),
    ("gptq", ("method=gptq", "bits=2", "group_size=64")),
    ("gptq", ("method=gptq", "bits=3")),
    ("gptq", (*FOUR, "symmetric=true")),
    ("gptq", (*FOUR, "act_order=true")),
    ("gptq", EIGHT),
    ("gptq", AWQ),
]
IN: list[tuple[str, Words]] = [  # layouts of `tests.formats.writers`, of the export, and types of GGUF
    ("compressed_tensors", FOUR),
    ("naive", EIGHT),
    ("gptq v1", (*FOUR, "symmetric=true")),
    ("gptq v2", ("method=gptq", "bits=3", "group_size=64")),
    ("gptq v2", (*FOUR, "act_order=true")),
    ("awq", FOUR),
    ("bitsandbytes", NF4),
    ("GGUF Q4_1", ()),
    ("GGUF Q8_0", ()),
]
ROUNDED = "norms, biases and scales that take AWQ's column scales are rounded anew"


@dataclass(frozen=True)
class Row:
    """A format and a run.

    Attributes:
        direction: `out` or `in`.
        layout: of the tensors, in words.
        settings: of the run that made the codes.
        reader: what has loaded the checkpoint.
        before, after: perplexity.
        why: they differ.
    """

    direction: str
    layout: str
    settings: str
    reader: str
    before: float
    after: float
    why: str = ""

    @property
    def verdict(self) -> str:
        """Whether the perplexity after is the one before; else how far it is, and why."""
        if self.before == self.after:
            return "to the last bit"
        return f"within {abs(self.after / self.before - 1):.0e} of it: {self.why}"

    @property
    def words(self) -> tuple[str, ...]:
        """The cells of the table for people."""
        numbers = (f"{self.before:.4f}", f"{self.after:.4f}")
        return self.direction, self.layout, self.settings, self.reader, *numbers, self.verdict


def rows(scratch: Path) -> Iterator[Row]:
    """All rows, made in a folder for the time being."""
    for layout, settings in OUT:
        yield _out(layout, settings, scratch)
    for layout, settings in IN:
        yield _of_gguf(layout, scratch) if "GGUF" in layout else _in(layout, settings, scratch)


def _run(scratch: Path, *settings: str) -> dict[str, Any]:
    found = run_cell(check([*FIXED, f"results={scratch / 'results'}", *settings], multirun=False)[0])
    assert found["status"] == "done", found
    return found


def _export(run: dict[str, Any], layout: str, to: Path) -> dict[str, Any]:
    if not to.exists():
        invoke([run["folder"], f"format={layout}", f"to={to}", "device=cpu"], export.main)
    return json.loads((to / FACTS).read_text(encoding="utf-8"))


def _out(layout: str, settings: Words, scratch: Path) -> Row:
    run = _run(scratch, *settings)
    to = scratch / layout / run["digest"]
    facts = _export(run, layout, to)
    config = json.loads((to / "config.json").read_text(encoding="utf-8")).get("quantization_config", {})
    kind = config.get("format", config.get("checkpoint_format", ""))
    reader, before, after = (facts["check"][name] for name in ("reader", "before", "after"))
    why = ROUNDED if "folded" in facts else ""
    return Row("out", f"{layout} {kind}".strip(), " ".join(settings), reader, before, after, why)


def _in(layout: str, settings: Words, scratch: Path) -> Row:
    run = _run(scratch, *settings)
    folder = scratch / layout / run["digest"]
    if layout == "compressed_tensors":
        _export(run, layout, folder)
    else:
        write_packed(BUNDLED, Path(run["folder"]), folder, layout, BLOCKS)
    # In the dtype in which the run was measured; the files of the bundled model are in another.
    stored = _run(scratch, "method=stored", "model=local", f"model.path={folder}", "model.dtype=float32")
    before, after = (each[metrics.ppl(TEXT)] for each in (run, stored))
    return Row("in", stored[metrics.STORED_LAYOUT], " ".join(settings), "method=stored", before, after)


def _of_gguf(layout: str, scratch: Path) -> Row:
    """A small random Llama, as the architecture of the bundled model has no GGUF."""
    file = scratch / f"{layout.split()[1]}.gguf"
    write_gguf(file, kind=layout.split()[1])
    where = ("model=local", f"model.path={file}", "model.sequence_length=64")
    before, after = (_run(scratch, f"method={name}", *where)[metrics.ppl(TEXT)] for name in ("fp16", "stored"))
    return Row("in", layout, "a random Llama of one block", "method=stored", before, after)


def write_table(found: list[Row], folder: Path) -> None:
    """Write formats.csv and a README with the same table."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / CSV).open("w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, [each.name for each in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in found)
    (folder / PAGE).write_text(page(found), encoding="utf-8")


def page(found: list[Row]) -> str:
    """The table for people."""
    lines = [f"| {' | '.join(row.words)} |" for row in found]
    return f"""# Formats in and out

Perplexity of the bundled model on {WINDOWS} windows of {TEXT} before it was written in a format and after it was loaded
again; made by `python -m tests.format_table` on a CPU. *Out*: `python -m runners.export`, before is the run's perplexity.
*In*: `method=stored`, before is that of the same weights in floating point. That each layout is the other tool's, bit for
bit, is what `tests/formats/golden/` shows.

| | format | made with | read by | before | after | equal |
|:--|:--|:--|:--|--:|--:|:--|
{chr(10).join(lines)}
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        found = []
        for row in rows(Path(scratch)):
            print(row.direction, row.layout, row.settings, row.before, row.after, row.verdict, sep="  ", flush=True)
            found.append(row)
    write_table(found, TABLE)


if __name__ == "__main__":
    main()
