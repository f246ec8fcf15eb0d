"""Audits side by side: what each layer of several runs costs alone, from the files of `python -m runners.audit`.

A folder holds one CSV file per run, named after it: `rtn.csv`, `gptq.csv`. All must be of the same windows of one text.
"""

import math
import os
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import spearmanr

from runners.errors import InputError
from runners.project import ROOT

FOLDER = "AUDIT_FOLDER"  # the variable of the environment that names another folder
FIRST = ROOT / "results" / "smollm2" / "audit"
ROUNDING = "rtn"  # what the others are compared with, where it is there
ERRORS = {"relative_error": "relative error", "held_out_error": "held-out error", "token_error": "token error"}
MEASURED_ON = ["text", "windows", "length"]
NEEDED = ["block", "layer", "kl", "ppl", "kl_first_positions", "kl_rest", *MEASURED_ON]


def default_folder() -> Path:
    """The folder that `AUDIT_FOLDER` names; else that of SmolLM2, else the first of any study.

    Raises:
        InputError: there is none.
    """
    if named := os.environ.get(FOLDER):
        return Path(named)
    found = [folder for folder in (FIRST, *sorted((ROOT / "results").glob("*/audit"))) if any(folder.glob("*.csv"))]
    if not found:
        raise InputError(
            f"there is no audit: write some with python -m runners.audit RUN to={FIRST}/NAME.csv, or set {FOLDER}"
        )
    return found[0]


def read_audits(folder: Path) -> pd.DataFrame:
    """The rows of all audits in a folder, with the name of the file as `run`, the base first.

    Raises:
        InputError: there are none, one is damaged, or they are of different texts or windows.
    """
    files = sorted(folder.glob("*.csv"), key=lambda file: (file.stem != ROUNDING, file.stem))
    if not files:
        raise InputError(f"there is no audit in {folder}: python -m runners.audit RUN to={folder}/NAME.csv writes one")
    frames = [_read(file) for file in files]
    frame = pd.concat(frames, ignore_index=True)
    if len(different := frame[MEASURED_ON].drop_duplicates()) > 1:
        first, second = (" ".join(map(str, row)) for row in different.head(2).to_numpy())
        raise InputError(f"the audits in {folder} are not of the same windows: one is of {first}, one of {second}")
    return frame


def single_layers(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of single layers, without whole blocks and whole models."""
    layers = frame.loc[(frame["layer"] != "all") & frame["block"].notna()]
    return layers.astype({"block": int}).reset_index(drop=True)


def whole_and_sum(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per run: its KL with everything quantized, the sum of its layers' KL alone, and the quotient of the two.

    Where the audit has restored layers, also the sum of what each takes off the whole model's KL.
    """
    layers = single_layers(frame)
    rows = []
    for name, run in frame[frame["block"].isna()].groupby("run", sort=False):
        by_layer = run.set_index("layer")
        whole, none = by_layer.loc["all"], by_layer.loc["none"]
        mine = layers.loc[layers["run"] == name]
        total = mine["kl"].sum()
        facts = {"run": name, "ppl unquantized": none["ppl"], "ppl": whole["ppl"], "KL of the model": whole["kl"]}
        facts |= {"sum of layers alone": total, "sum / whole": total / whole["kl"]}
        if "kl_restored" in mine and len(restored := mine["kl_restored"].dropna()):
            facts["layers restored"] = (whole["kl"] - restored).sum()
        rows.append(facts)
    return pd.DataFrame(rows)


def compared(frame: pd.DataFrame, base: str, other: str) -> pd.DataFrame:
    """What each layer costs alone in two runs, with `difference`: by how much more in `other`; the largest first."""
    key, layers = ["block", "layer"], single_layers(frame)
    shown = [*key, "kl", "kl_first_positions", "kl_rest", *(c for c in layers if c.startswith("energy_"))]
    left, right = (layers.loc[layers["run"] == name, shown] for name in (base, other))
    energies = [name for name in shown if name.startswith("energy_")]
    both = left.drop(columns=energies).merge(right, on=key, suffixes=(f" {base}", f" {other}"))
    both["difference"] = both[f"kl {other}"] - both[f"kl {base}"]
    return both.sort_values("difference", ascending=False, ignore_index=True)


def error_correlations(frame: pd.DataFrame) -> pd.DataFrame:
    """Spearman's correlation of each layer error with the layer's KL alone, over the layers of a run, one row per run.

    `in its kind` is the mean of the correlations among layers of one name, which differ in their block alone.
    """
    rows = []
    for name, run in single_layers(frame).groupby("run", sort=False):
        row = {"run": name}
        for column, words in ERRORS.items():
            if column in run and len(set(run[column].dropna())) > 1:
                row[words] = _spearman(run, column)
                kinds = [_spearman(kind, column) for _, kind in run.groupby("layer") if len(kind) > 2]
                row[f"{words}, in its kind"] = pd.Series(kinds, dtype=float).mean()
        rows.append(row)
    return pd.DataFrame(rows)


def _spearman(rows: pd.DataFrame, column: str) -> float:
    """NaN where one of the two is the same for all layers."""
    known = rows.dropna(subset=[column])
    error, kl = known[column].to_numpy(float), known["kl"].to_numpy(float)
    if len(set(error)) < 2 or len(set(kl)) < 2:
        return math.nan
    found: Any = spearmanr(error, kl)
    return float(found.statistic)


def _read(file: Path) -> pd.DataFrame:
    try:
        frame = pd.read_csv(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is damaged ({error}): write it again with python -m runners.audit") from error
    if missing := [name for name in NEEDED if name not in frame]:
        raise InputError(
            f"{file} is no audit, it has no column {missing[0]}: python -m runners.audit RUN to={file} writes one"
        )
    return frame.assign(run=file.stem)
