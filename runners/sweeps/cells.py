"""The cells of a study and how far each has come, read from its folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runners.config.settings import Settings
from runners.errors import InputError
from runners.results.metrics import MODEL_PATH, model_words
from runners.results.progress import owner_words, progress_words, read_progress
from runners.results.run_folder import RunFolder
from runners.storage.files import write
from runners.storage.locks import file_lock

CELLS = "cells.json"  # in a study's folder: what its sweeps are to run, by run folder


def describe_cells(cells: Sequence[Settings]) -> list[dict[str, Any]]:
    """One row a cell: what it is, and under `status` and `error` how far it has come."""
    unique = list({cell.folder: cell for cell in cells}.values())
    rows = zip(unique, differences(unique), strict=True)
    described = [_label(cell, difference) | read_status(cell.folder) for cell, difference in rows]
    return [row | {"model": model} for row, model in zip(described, model_words(described), strict=True)]


def read_status(folder: Path) -> dict[str, Any]:
    """How far the run in a folder has come.

    Returns:
        The run's metrics where it has ended. Else `status`, which is `running`, `unfinished` (blocks of it are on disk),
        `interrupted` or `missing`; `error`, which says more; and where it is running, `progress`.
    """
    run = RunFolder(folder)
    try:
        metrics = run.metrics()
    except InputError as error:
        return {"status": "failed", "reason": "damaged", "error": str(error)}
    if metrics is not None and metrics.get("reason") != "interrupted":
        return metrics
    progress = read_progress(folder)
    if run.is_running():
        seen = "" if progress is None else f"{progress_words(progress).removeprefix('during ')}; "
        return {"status": "running", "error": seen + owner_words(progress), "progress": progress}
    last = metrics["error"] if metrics else "" if progress is None else f"its process died {progress_words(progress)}"
    if blocks := len(list(folder.glob("checkpoint/block-*.json"))):
        return {"status": "unfinished", "error": "; ".join([f"{blocks} blocks are on disk", *([last] if last else [])])}
    return {"status": "interrupted" if last else "missing", "error": last or "it did not run"}


def register_cells(cells: Sequence[Settings]) -> None:
    """Write down what a sweep is to run, references included, beside what other sweeps of its study have written."""
    for study in {cell.study_folder for cell in cells}:
        mine = [cell for cell in cells if cell.study_folder == study]
        references = {cell.reference().folder: cell.reference() for cell in mine if cell.run.quantizes}
        unique = list((references | {cell.folder: cell for cell in mine}).values())
        rows = zip(unique, differences(unique), strict=True)
        labels = {cell.folder.relative_to(study).as_posix(): _label(cell, difference) for cell, difference in rows}
        with file_lock(study / f".{CELLS}.lock", -1):
            write(study / CELLS, json.dumps(registered_cells(study) | labels, indent=1) + "\n")


def registered_cells(study: Path) -> dict[str, dict[str, Any]]:
    """What the sweeps of a study are to run, by run folder.

    Raises:
        InputError: the list is damaged.
    """
    try:
        return json.loads((study / CELLS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{study / CELLS} cannot be read ({error}): delete it, and start the sweep again") from error


def _label(cell: Settings, difference: str) -> dict[str, Any]:
    bits = {"bits": cell.run.bits} if cell.run.quantizes else {}
    model = {"model": cell.run.model.name, MODEL_PATH: cell.run.model_path}
    return {"method": cell.run.method.name, **model, **bits, "setting": difference}


def differences(cells: Sequence[Settings]) -> list[str]:
    """For each run of a sweep the settings in which it differs from others of the same method, but for the bits."""
    flat = [_flatten(settings.identity()) for settings in cells]
    answer = []
    for settings, mine in zip(cells, flat, strict=True):
        peers = [
            other for cell, other in zip(cells, flat, strict=True) if cell.run.method.name == settings.run.method.name
        ]
        keys = [key for key in mine if any(other.get(key) != mine[key] for other in peers)]
        shown = [key for key in keys if not key.startswith(("model.", "data.", "evaluation.")) and key != "grid.bits"]
        answer.append(", ".join(f"{key.rpartition('.')[2]}={mine[key]}" for key in shown))
    return answer


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
