"""Reads the runs of a study into one data frame, one row per run, and the tables that each run keeps beside its metrics."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from analysis.evaluations import MORE, merged
from runners.results import metrics
from runners.results.metrics import (
    CALIBRATION,
    CALIBRATION_INPUTS,
    METRICS,
    MODEL_DTYPE,
    MODEL_PATH,
    REFERENCE,
    STORED,
    TOKEN_WEIGHTS,
    UNCALIBRATED,
    UNIFORM,
    damaged,
)
from runners.results.seal import read_run

WINDOWS = "windows.csv"
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C ten times as fast, where PyYAML was built with it


def collect(study: Path | Sequence[Path], conditions: Mapping[str, str] | None = None) -> pd.DataFrame:
    """The metrics of every run of a study, with the device that it ran on and, under `folder`, its folder.

    Runs that are evaluations of one quantization are one row (`analysis.evaluations`).

    `place` is the run's folder seen from that of the report (see `home`). A cell that several studies have run counts once.

    Args:
        study: the folder that holds `<model>/<run>/metrics.json`; of several studies, their folders.
        conditions: columns and their values, as written on the command line; other runs are left out (see `keep`).

    Raises:
        FileNotFoundError: the folder holds no runs.
        ValueError: a file is damaged, a condition fits no run, or the runs are of kinds that no table may mix:
            different texts under one name, different protocols, different calibration inputs.
    """
    studies = [study] if isinstance(study, Path) else list(study)
    frame = _frame(_merged([run for each in studies for run in _read_runs(each)]))
    frame["place"] = [Path(os.path.relpath(folder, home(studies))).as_posix() for folder in frame["folder"]]
    for column, value in (conditions or {}).items():
        frame = keep(frame, column, value)
    _refuse_mixtures(frame)
    return frame


def _merged(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each cell once, although several studies have run it; and the evaluations of a quantization as one."""
    by_digest: dict[str, dict[str, Any]] = {}
    for run in runs:
        by_digest.setdefault(run.get("digest") or run["folder"], run)
    return merged(list(by_digest.values()))


def home(studies: Sequence[Path]) -> Path:
    """The folder below which reports are: a study's own; of several studies one beside the first, with all their names."""
    if len(studies) == 1:
        return studies[0]
    return studies[0].resolve().parent / "+".join(study.resolve().name for study in studies)


def _read_runs(study: Path) -> list[dict[str, Any]]:
    runs = [_read_run(file) for file in sorted(study.glob(f"*/*/{METRICS}"))]
    if not runs:
        raise FileNotFoundError(f"{study.absolute()} holds no runs: there is no <model>/<run>/{METRICS} in it")
    return runs


def collect_run(folder: Path) -> pd.DataFrame:
    """A single run as a frame of one row.

    Raises:
        FileNotFoundError: the folder is not that of a run, or the run has not ended.
        ValueError: a file is damaged.
    """
    if not (folder / METRICS).exists():
        raise FileNotFoundError(f"{folder} holds no {METRICS}: it is not a run's folder, or the run has not ended")
    return _frame([_read_run(folder / METRICS)])


def keep(frame: pd.DataFrame, column: str, value: str) -> pd.DataFrame:
    """The runs whose `column` reads `value` on the command line, and the unquantized ones, which every table needs.

    A value `a,b` stands for both.

    Raises:
        ValueError: there is no such column, or no run has that value.
    """
    if column not in frame:
        raise ValueError(f"the runs have no {column}: they have {', '.join(map(str, frame.columns))}")
    written = [_written(entry) for entry in frame[column]]
    values = [value] if value in written else value.split(",")  # an entry may have a comma of its own
    for each in values:
        if each not in written:
            raise ValueError(f"no run has {column}={each}: there are {', '.join(sorted(set(written)))}")
    wanted = [entry in values or method == REFERENCE for entry, method in zip(written, frame["method"], strict=True)]
    return frame.loc[wanted]


def environment(folder: str) -> dict[str, Any]:
    """The content of a run's `environment.json`; empty where there is none.

    Raises:
        ValueError: the file is damaged.
    """
    file = Path(folder) / "environment.json"
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(file, error) from error
    if not isinstance(content, dict):
        raise _damaged(file, "no table of names and values")
    return content


def read_tables(runs: pd.DataFrame, name: str) -> pd.DataFrame:
    """One table that every run may have (layers.csv, windows.csv, sweeps.csv), of all runs below each other.

    Each row also has the series and the seed of its run. Empty where no run has such a file.

    Raises:
        ValueError: a file is damaged.
    """
    tables = []
    for run in runs.to_dict("records"):
        if (table := _read_table(run, name)) is not None:
            seed = run.get("seed")
            # A run without a seed (full precision) is one of a single seed; `seed != seed` holds for NaN alone.
            tables.append(table.assign(series=run["series"], seed=0 if seed is None or seed != seed else int(seed)))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _read_table(run: dict[Any, Any], name: str) -> pd.DataFrame | None:
    """A table of one row of the frame: of several evaluations the windows of each, everything else from the first."""
    more = run.get(MORE)  # NaN in the rows of single evaluations
    folders = [run["folder"], *(more if isinstance(more, list) and name == WINDOWS else [])]
    tables: list[pd.DataFrame] = []
    seen: set[str] = set()
    for file in (Path(folder) / name for folder in folders):
        if file.exists():
            try:
                table = pd.read_csv(file)
            except ValueError as error:
                raise _damaged(file, error) from error
            tables.append(table.loc[~table["text"].isin(list(seen))] if seen else table)
            seen.update(table["text"] if name == WINDOWS else ())
    return pd.concat(tables, ignore_index=True) if tables else None


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame([_with_dtype(row, rows) for row in rows])
    frame["series"] = frame["series"].fillna(frame["folder"])  # a run that names no series is one of its own
    frame["model"] = metrics.model_words(rows)  # two models of one name share no row, no figure and no reference
    return frame


def _with_dtype(run: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The same with the dtype of the unquantized model, after which tables name it, where the run is older than the key.

    Its settings may have set it; if they left it to the model's files, a younger run of these files with the same setting
    has recorded it.
    """
    if run["method"] != REFERENCE or run.get(MODEL_DTYPE) or not (model := _model(Path(run["folder"]))):
        return run
    alike = (
        each[MODEL_DTYPE]
        for each in runs
        if each.get(MODEL_DTYPE)
        and each[MODEL_PATH] == run[MODEL_PATH]
        and _set_alike(model, _model(Path(each["folder"])))
    )
    return run | {MODEL_DTYPE: model.get("dtype") or next(alike, None)}


def _set_alike(model: dict[str, Any], other: dict[str, Any]) -> bool:
    return bool(other) and model.get("dtype") == other.get("dtype")


def _read_run(file: Path) -> dict[str, Any]:
    run = {"series": None, "group_size": None, CALIBRATION_INPUTS: None, TOKEN_WEIGHTS: None} | read_run(file.parent)
    if run["method"] not in (REFERENCE, STORED) and run.get(CALIBRATION) != UNCALIBRATED:
        # Runs older than these keys always used the quantized model's activations, and weighed all tokens alike.
        run[CALIBRATION_INPUTS] = run[CALIBRATION_INPUTS] or "quantized"
        run[TOKEN_WEIGHTS] = run[TOKEN_WEIGHTS] or UNIFORM
    path = run.get(MODEL_PATH) or _model_path(file.parent)
    device = environment(str(file.parent)).get("device")
    return run | {MODEL_PATH: path, "device": device, "folder": str(file.parent)}


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of a run, from its `config.yaml`; nothing where there is none.

    Raises:
        ValueError: the file is damaged.
    """
    config = folder / "config.yaml"
    try:
        content = yaml.load(config.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise _damaged(config, str(error).split("\n")[0]) from error
    if not isinstance(content, dict):
        raise _damaged(config, "no table of names and values")
    return content


def _model(folder: Path) -> dict[str, Any]:
    """The settings of a run's model; empty where there are none."""
    model = read_config(folder).get("model", {})
    if not isinstance(model, dict):
        raise _damaged(folder / "config.yaml", "model is no table of names and values")
    return model


def _model_path(folder: Path) -> str | None:
    """The same from the settings of a run that is older than the key; None where they do not have it."""
    model = _model(folder)
    return str(model["path"]) if "path" in model else None


def _damaged(file: Path, why: object) -> ValueError:
    return ValueError(damaged(file, why))


def _written(entry: Any) -> str:
    """An entry as it is written on the command line."""
    if entry is None or entry != entry:  # a gap in a frame is None or NaN
        return "null"
    return f"{entry:g}" if isinstance(entry, int | float) and not isinstance(entry, bool) else str(entry)


def _refuse_mixtures(frame: pd.DataFrame) -> None:
    """Numbers in one column must be of one protocol and one text, or they cannot be compared.

    Texts are compared per model: their hash is that of token ids, and tokenizers differ.
    """
    _refuse(frame, CALIBRATION_INPUTS, f"the runs mix {CALIBRATION_INPUTS}")
    for text in metrics.names(frame.columns, "protocol"):
        key, what = metrics.protocol(text), f"the runs on {text} mix protocols"
        # Where BOS is depends on the model: tables say it, and mix it over models, never within one.
        without_bos: Any = frame[key].map(metrics.base_protocol, na_action="ignore")
        _refuse(frame, key, what, without_bos)
        for _, runs in frame.groupby("model"):
            _refuse(runs, key, what)
    for text in metrics.names(frame.columns, "sha256"):
        for model, runs in frame.groupby("model"):
            what = f"the runs of {model} on {text} mix texts (another Python, or other data)"
            _refuse(runs, metrics.sha256(text), what)


def _refuse(frame: pd.DataFrame, column: str, what: str, compared: pd.Series | None = None) -> None:
    different = sorted(set(frame[column].dropna()))
    if len(set((frame[column] if compared is None else compared).dropna())) > 1:
        choices = " or ".join(f"{column}={value}" for value in different)
        raise ValueError(f"{what}: {', '.join(different)}. Choose by {choices}")
