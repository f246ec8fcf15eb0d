"""The cells of a study, and the status of each, read from the study's folder.

Nothing is kept in memory or in a service: any process on any machine that sees the folder finds the same.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runners.config.settings import Settings
from runners.errors import InputError
from runners.results.metrics import (
    CALIBRATION,
    CALIBRATION_NAME,
    COMMAND,
    MIXED,
    MODEL_PATH,
    TASKS_LEFT,
    UNCALIBRATED,
    Reason,
    Status,
    bits_words,
    model_words,
)
from runners.results.progress import owner_words, progress_words, read_progress
from runners.results.run_folder import RunFolder
from runners.storage.files import write
from runners.storage.locks import file_lock

CELLS = "cells.json"  # in a study's folder: the labels of all cells of its sweeps, by run folder


def describe_cells(cells: Sequence[Settings]) -> list[dict[str, Any]]:
    """For each cell, once: its labels (method, model, bits, setting), its `folder` and what `read_status` returns."""
    described = [label | read_status(folder) | {"folder": folder} for folder, label in _labels(cells).items()]
    return [row | {"model": model} for row, model in zip(described, model_words(described), strict=True)]


def cell_names(cells: Sequence[Settings]) -> dict[Path, str]:
    """What each cell is called in a sentence, by its folder: `toy gptq 3 bits seed=1`."""
    # Of each model by itself: another model often comes with other data, which would be told with every cell.
    models = dict.fromkeys(cell.run.model for cell in cells)
    labels = {
        folder: label
        for model in models
        for folder, label in _labels([cell for cell in cells if cell.run.model == model]).items()
    }
    names = model_words(list(labels.values()))
    return {
        folder: cell_name(label | {"model": model})
        for (folder, label), model in zip(labels.items(), names, strict=True)
    }


def cell_name(row: Mapping[str, Any]) -> str:
    """What a cell is called in a sentence, from its labels."""
    bits = bits_words(row["bits"]) + " mixed" * (MIXED in row) if "bits" in row else ""
    return " ".join(part for part in (row["model"], row["method"], bits, row["setting"]) if part)


def read_status(folder: Path) -> dict[str, Any]:
    """How far the run in a folder has come.

    Returns:
        The run's metrics if it has ended, and TASKS_LEFT where it is done but for these. Else `status`, which is `running`,
        `unfinished` (finished blocks are on disk), `interrupted` or `missing`; `error`, which tells more; and of a running
        one `progress`, beside its metrics if it has a result meanwhile.
    """
    run = RunFolder(folder)
    try:
        metrics = run.metrics()
    except InputError as error:
        return {"status": Status.FAILED, "reason": Reason.DAMAGED, "error": str(error)}
    left = [] if metrics is None else run.tasks_left(metrics)
    if metrics is not None and metrics.get("reason") != Reason.INTERRUPTED and not left:
        return metrics
    progress = read_progress(folder)
    if run.is_running():  # before all that follows: what it has left on disk is not final
        stage = "" if progress is None else f"{progress_words(progress).removeprefix('during ')}; "
        running = {"status": Status.RUNNING, "error": stage + owner_words(progress), "progress": progress}
        return (metrics or {} if left else {}) | running
    if metrics is not None and left:
        return metrics | {TASKS_LEFT: f"not measured, as memory ran out: {', '.join(left)}"}
    return _status_of_unended(folder, _last_words(metrics, progress))


def _last_words(metrics: dict[str, Any] | None, progress: dict[str, Any] | None) -> str:
    """How a run that has not ended came to its stop; "" if it has never run."""
    if metrics is not None:
        return metrics["error"]
    return "" if progress is None else f"its process died {progress_words(progress)}"


def _status_of_unended(folder: Path, last: str) -> dict[str, Any]:
    if blocks := len(list(folder.glob("checkpoint/block-*.json"))):
        words = [f"{blocks} blocks are on disk", *([last] if last else [])]
        return {"status": Status.UNFINISHED, "error": "; ".join(words)}
    return {"status": Status.INTERRUPTED if last else Status.MISSING, "error": last or "it did not run"}


def register_cells(cells: Sequence[Settings], words: Sequence[str] = (), multirun: bool = True) -> None:
    """Add the cells of a command, references included, to the list of their study, so that missing ones can be told.

    Args:
        words: the settings of the command as they were typed: what is to be given again to go on with a cell.
        multirun: whether the command is a sweep's.
    """
    command = [*(["-m"] if multirun else []), *words]
    for study in {cell.study_folder for cell in cells}:
        mine = [cell for cell in cells if cell.study_folder == study]
        references = {cell.reference().folder: cell.reference() for cell in mine if cell.run.is_compared}
        labels = _labels(list((references | {cell.folder: cell for cell in mine}).values()))
        named = {folder.relative_to(study).as_posix(): label | {COMMAND: command} for folder, label in labels.items()}
        # Sweeps of one study may start at the same time: without the lock one could overwrite what another has added.
        study.mkdir(parents=True, exist_ok=True)
        with file_lock(study / f".{CELLS}.lock", -1):
            before = registered_cells(study)
            for name, label in named.items():  # alone a cell has no peers, and so no words that tell it from them
                label["setting"] = label["setting"] or before.get(name, label).get("setting", "")
            write(study / CELLS, json.dumps(before | named, indent=1) + "\n")


def registered_cells(study: Path) -> dict[str, dict[str, Any]]:
    """The labels of all cells of a study's sweeps, by run folder; nothing if no sweep has run there.

    Raises:
        InputError: the list is damaged.
    """
    try:
        return json.loads((study / CELLS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{study / CELLS} cannot be read ({error}): delete it, and start the sweep again") from error


def differences(cells: Sequence[Settings]) -> list[str]:
    """For each cell the settings in which it differs from other cells of its method, apart from its bits: `seed=1`.

    Settings of the model, the data and the evaluation are left out: the model has a column of its own.
    """
    flat = [_flat_identity(settings) for settings in cells]
    answer = []
    for settings, mine in zip(cells, flat, strict=True):
        peers = [
            other for cell, other in zip(cells, flat, strict=True) if cell.run.method.name == settings.run.method.name
        ]
        keys = [key for key in mine if any(_differs(key, mine, other) for other in peers)]
        shown = [key for key in keys if not key.startswith(("model.", "data.", "evaluation.")) and key != "grid.bits"]
        answer.append(", ".join(f"{_short(key)}={mine[key]}" for key in shown))
    return answer


def _flat_identity(cell: Settings) -> dict[str, Any]:
    identity = cell.identity()
    if cell.run.is_mixed:
        identity["layers"] = cell.run.layer_words
    if cell.run.quantizes and cell.run.calibration is None:
        identity["calibration"] = {"name": UNCALIBRATED}
    return _flatten(identity)


def _differs(key: str, mine: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two cells differ in a setting that both have: of no calibration the others differ in its name alone."""
    names = (mine.get(CALIBRATION_NAME), other.get(CALIBRATION_NAME))
    is_missing = key.startswith("calibration.") and key != CALIBRATION_NAME and UNCALIBRATED in names
    return not is_missing and other.get(key) != mine[key]


def _short(key: str) -> str:
    return CALIBRATION if key == CALIBRATION_NAME else key.rpartition(".")[2]


def _labels(cells: Sequence[Settings]) -> dict[Path, dict[str, Any]]:
    """The labels of each cell, by its folder."""
    unique = list({cell.folder: cell for cell in cells}.values())
    settings = differences(unique)
    return {cell.folder: _label(cell, setting) for cell, setting in zip(unique, settings, strict=True)}


def _label(cell: Settings, setting: str) -> dict[str, Any]:
    grid = {"bits": cell.run.bits, "group_size": cell.run.group_size} if cell.run.quantizes else {}
    grid |= {MIXED: cell.run.layer_words} if cell.run.is_mixed else {}
    model = {"model": cell.run.model.name, MODEL_PATH: cell.run.labeled_path}
    return {"method": cell.run.method.name, **model, **grid, "setting": setting, "series": cell.series}


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
