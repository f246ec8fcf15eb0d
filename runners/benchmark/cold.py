"""Time what a user waits for on the bundled model: a run, a sweep of six cells, what of a cell is no work; and dtypes.

python -m runners.benchmark.cold machine=FOLDER        adds to results/benchmark/FOLDER/cold.csv; minutes

Each command is started as a user would, without a cache or results of an earlier one, but for the code that numba keeps.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch

from runners.arguments import start
from runners.errors import InputError
from runners.project import ROOT, results_folder
from runners.results.metrics import EVALUATE_SECONDS, METRICS, QUANTIZE_SECONDS, RUN_SECONDS
from runners.run.environment import environment
from runners.storage.files import write

FEW = (
    "method=rtn",
    "calibration.num_sequences=8",
    "evaluation=stdlib_docs",
    "evaluation.texts.stdlib_docs.max_windows=8",
)
COMMANDS = {
    "run": (),
    "six rtn cells": ("-m", "method=rtn", "bits=2,3,4,5,6,8"),
    **{f"short run in {dtype}": (*FEW, f"model.dtype={dtype}") for dtype in ("float32", "bfloat16", "float16")},
}


def main(
    machine: Annotated[str, "name of the folder in results/benchmark/ that the table is for"],
    results: Annotated[Path | None, "folder of all studies (default: results/ of the project)"] = None,
) -> None:
    """Add to cold.csv: a row per command, each run once, under the commit that was measured."""
    file = (results or results_folder()) / "benchmark" / machine / "cold.csv"
    facts = environment(torch.device("cpu"))
    commit = str(facts["commit"])[:7]
    rows = [measure(name) | {"threads": facts["threads"], "commit": commit} for name in COMMANDS]
    before = [pd.read_csv(file).query("commit != @commit")] if file.exists() else []
    write(file, pd.concat([*before, pd.DataFrame(rows)]).to_csv(index=False))
    print(f"written to {file}")


def measure(command: str) -> dict[str, Any]:
    """One row of `cold.csv`, for a command that COMMANDS names.

    Returns:
        `seconds` from the start of the command to its end; `load_before`, what else the machine did (processes, by its mean
        of a minute); and the medians over its cells of the seconds that `outside_work` returns, first and later cells apart.

    Raises:
        InputError: the command has failed.
    """
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, str(ROOT / "run.py"), *COMMANDS[command], f"results={folder}"]
        begin = time.perf_counter()
        answer = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        seconds = time.perf_counter() - begin
        if answer.returncode:
            raise InputError(f"{' '.join(words)} has failed: {answer.stderr.strip()[-500:]}")
        files = sorted(Path(folder).glob(f"runs/*/[!f]*/{METRICS}"), key=lambda file: file.stat().st_mtime)
        outside = [outside_work(json.loads(file.read_text(encoding="utf-8"))) for file in files]
    later = statistics.median(outside[1:]) if len(outside) > 1 else None
    row = {"command": command, "seconds": seconds, "first_cell_outside_work": outside[0]}
    row |= {"later_cells_outside_work": later, "load_before": load}
    print(row, flush=True)
    return row


def outside_work(metrics: dict[str, Any]) -> float:
    """Seconds of a run that are neither quantization nor evaluation: tracker, texts, checkpoint, check of the walk."""
    return metrics[RUN_SECONDS] - metrics[QUANTIZE_SECONDS] - metrics[EVALUATE_SECONDS]


if __name__ == "__main__":
    start(main)
