"""Write the weights of a finished run as a checkpoint for other tools, load it again, and compare its perplexity.

python -m runners.export results/runs/tiny/gptq-3b-DIGEST format=compressed_tensors to=FOLDER
python -m runners.export RUN format=dense to=FOLDER text=wikitext2
"""

import os
import shutil
from pathlib import Path
from typing import Annotated, Literal

from runners.arguments import start
from runners.console import console
from runners.errors import InputError
from runners.export.card import Check, write_card
from runners.export.check import checked
from runners.export.compressed_tensors import CompressedTensors
from runners.export.gptq import Gptq, has_zero
from runners.export.layouts import ExportLayout
from runners.export.writer import write_weights
from runners.kept.run import KeptRun, open_run
from runners.results.run_folder import RunFolder
from runners.run.preflight import open_device
from runners.storage.files import check_writable

Format = Literal["compressed_tensors", "gptq", "dense"]


def main(
    run: Annotated[Path, "folder of a finished run that has kept its weights"],
    /,
    format: Annotated[Format, "compressed_tensors: 2 to 8 bits; gptq: 2, 3, 4 or 8; dense: dequantized, any method"],
    to: Annotated[Path, "folder to write; it must not exist"],
    text: Annotated[str | None, "one of the run's texts, to measure the export on; by default the first"] = None,
    check: Annotated[bool, "load the export again and compare its perplexity with the run's"] = True,
    model: Annotated[str | None, "folder of the model, where it is no longer where the run had it"] = None,
    data_root: Annotated[str | None, "folder of the data sets; by default as in the run"] = None,
    device: Annotated[str | None, "cpu, cuda or cuda:N, to measure on; by default a GPU where there is one"] = None,
) -> None:
    """Write the weights of a finished run as a checkpoint for other tools."""
    if to.exists():
        raise InputError(f"{to} exists: name a folder that does not, or remove it")
    check_writable(to)
    where = open_device(device)
    kept = open_run(run, model)
    batch_size = RunFolder(run).environment().get("batch_size", 1)  # the run's, as it decides the order of sums
    partial = to.with_name(f"{to.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    found = None
    try:
        written = write_weights(kept, _layout(format, kept), partial)
        if check:
            found = checked(kept, partial, format, where, batch_size, text=text, data_root=data_root)
        write_card(kept, partial, run, format, written, found)
        partial.rename(to)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _report(to, written.size, found)


def _layout(name: Format, kept: KeptRun) -> ExportLayout | None:
    if name == "dense":
        return None
    return CompressedTensors() if name == "compressed_tensors" else Gptq(has_zero(kept.blocks))


def _report(to: Path, size: int, found: Check | None) -> None:
    console.print(f"written to {to}, {size / 1e6:,.1f} MB of tensors", highlight=False, soft_wrap=True)
    words = "not loaded again: check=true measures it" if found is None else found.words()
    console.print(words, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    start(main)
