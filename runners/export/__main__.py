"""Write the weights of a finished run as a checkpoint for other tools; load it again, and compare its perplexity with the run's.

python -m runners.export results/runs/tiny/gptq-3b-DIGEST format=compressed_tensors to=FOLDER
python -m runners.export RUN format=dense to=FOLDER text=wikitext2
"""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from runners.arguments import start
from runners.console import console
from runners.errors import InputError
from runners.export.card import Check, write_card
from runners.export.check import measured_again
from runners.export.compressed_tensors import CompressedTensors
from runners.export.gptq import Gptq, has_zero
from runners.export.layouts import Layout
from runners.export.writer import write_weights
from runners.results import metrics
from runners.run.kept_run import KeptRun, open_run
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
) -> None:
    """Write the weights of a finished run as a checkpoint for other tools."""
    if to.exists():
        raise InputError(f"{to} exists: name a folder that does not, or remove it")
    check_writable(to)
    if format == "compressed_tensors" and check and find_spec("compressed_tensors") is None:
        raise InputError(
            'loading the export again needs a package that is not installed: pip install -e ".[export]"; or check=false, '
            "which its card will say"
        )
    kept = open_run(run, model)
    partial = to.with_name(f"{to.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        size = write_weights(kept, _layout(format, kept), partial)
        checked = _checked(kept, partial, format, text, data_root) if check else None
        write_card(kept, partial, run, format, size, checked)
        partial.rename(to)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _report(to, size, checked)


def _layout(name: Format, kept: KeptRun) -> Layout | None:
    if name == "dense":
        return None
    return CompressedTensors() if name == "compressed_tensors" else Gptq(has_zero(kept.blocks))


def _checked(kept: KeptRun, folder: Path, name: Format, text: str | None, data_root: str | None) -> Check:
    chosen, again = measured_again(kept, folder, name, text, data_root)
    return Check(chosen, kept.metrics[metrics.ppl(chosen)], again)


def _report(to: Path, size: int, checked: Check | None) -> None:
    console.print(f"written to {to}, {size / 1e6:,.1f} MB of tensors", highlight=False, soft_wrap=True)
    if checked is None:
        console.print("not loaded again: check=true measures it", highlight=False)
    else:
        console.print(checked.words(), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    start(main)
