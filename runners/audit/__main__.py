"""Find the layers that a quantized model's loss comes from; write audit.csv into the run's folder.

python -m runners.audit results/runs/tiny/gptq-3b-DIGEST
python -m runners.audit RUN restore=true by=layer,block windows=4 to=audit.csv
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

from runners.arguments import start
from runners.audit.layers import Change, LayerAudit
from runners.audit.room import explained, refuse_without_room
from runners.audit.table import rows_of, worst_tables, write_rows
from runners.console import console, progress
from runners.errors import InputError
from runners.kept.run import KeptRun, open_run
from runners.kept.windows import first_windows
from runners.models.blocks import InMemoryModel
from runners.models.checkpoint import load
from runners.models.walk_check import check_walk
from runners.run.preflight import default_batch_size, open_device
from runners.storage.files import check_writable


def main(
    run: Annotated[Path, "folder of a finished run that has kept its weights"],
    /,
    text: Annotated[str | None, "one of the texts that the run was evaluated on; by default the first"] = None,
    windows: Annotated[int, "how many windows of it, from its beginning"] = 8,
    length: Annotated[int | None, "tokens of a window; by default as in the run"] = None,
    by: Annotated[tuple[Literal["layer", "block"], ...], "what is quantized at a time"] = ("layer",),
    restore: Annotated[bool, "measure also with everything quantized but one"] = False,
    to: Annotated[Path | None, "file to write; by default audit.csv in the run's folder"] = None,
    top: Annotated[int, "how many of the worst are shown"] = 10,
    model: Annotated[str | None, "folder of the model, where it is no longer where the run had it"] = None,
    data_root: Annotated[str | None, "folder of the data sets; by default as in the run"] = None,
    device: Annotated[str | None, "cpu, cuda or cuda:N; by default a GPU where there is one"] = None,
    batch_size: Annotated[int | None, "windows that go through the model together; by default what suits it"] = None,
    dtype: Annotated[Literal["float32", "run"], "what is computed in; run: as in the run"] = "float32",
) -> None:
    """Find the layers that a quantized model's loss comes from: quantize one at a time, and leave all others alone."""
    _check(by, windows=windows, top=top, batch_size=1 if batch_size is None else batch_size)
    where = open_device(device)
    kept = open_run(run, model)
    file = to or run / "audit.csv"
    check_writable(file.parent)
    name, ids = first_windows(kept, text, windows, length, data_root)
    sized = dataclasses.replace(kept.checkpoint, sequence_length=ids.shape[1])
    size = batch_size or default_batch_size(sized, where)
    console.print(
        f"{kept.metrics['method']} on {where}: {len(ids)} windows of {ids.shape[1]} tokens of {name}", highlight=False
    )
    with explained(len(ids)):
        changes = _measure(kept, ids, size, where, dtype, by, restore)
    facts = {"text": name, "windows": len(ids), "length": ids.shape[1]}
    write_rows(file, rows_of(changes, kept.layers, facts))
    console.print(worst_tables(changes, kept.layers, top))
    console.print(f"written to {file}", highlight=False, soft_wrap=True)


def _check(by: tuple[str, ...], **numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")
    if not by:
        raise InputError("by must be layer, block or both: by=layer,block")


def _measure(
    kept: KeptRun, ids: Tensor, size: int, where: torch.device, dtype: str, by: tuple[str, ...], restore: bool
) -> list[Change]:
    stored = kept.checkpoint.stored_bits // 8
    refuse_without_room(kept.checkpoint, ids, where, max(stored, 4) if dtype == "float32" else stored)
    loaded = load(kept.checkpoint, kept.model, where)
    dtypes = {name: parameter.dtype for name, parameter in loaded.named_parameters()}
    # Activations in half precision are rounded, which is noise in every layer's KL as large as what some layers do.
    source = InMemoryModel(loaded if dtype == "run" else loaded.float())
    with torch.no_grad():
        check_walk(source, ids)
    audit = LayerAudit(source, kept.blocks, dtypes, ids, size)
    with progress("audit", len(audit.units(by)) * (1 + restore) + 2) as step:
        return audit.run(by, restore, step)


if __name__ == "__main__":
    start(main)
