"""Several evaluations of one quantization are one row: what each has measured, side by side.

Runs with the same `quantization` and the same codes differ in nothing but the texts and tasks that they have measured. Where
two have measured the same text by another protocol, or asked other questions of a task, they stay rows of their own.
"""

import math
from collections.abc import Iterable
from typing import Any

from runners.results import metrics
from runners.results.metrics import (
    CHECKPOINT_SHA256,
    EVALUATE_MEMORY,
    EVALUATE_SECONDS,
    MEASURED_HOW,
    QUANTIZATION,
    ZERO_SHOT_MEMORY,
    ZERO_SHOT_SECONDS,
    Status,
)

MORE = "more_folders"  # of a row: the folders of the other evaluations, besides `folder`
SUMMED, LARGEST = (EVALUATE_SECONDS, ZERO_SHOT_SECONDS), (EVALUATE_MEMORY, ZERO_SHOT_MEMORY)
HOW = ("protocol", "sha256", "windows", "bos")  # families of keys that must agree where two runs have measured one text

Run = dict[str, Any]


def merged(runs: list[Run]) -> list[Run]:
    """The runs, with those that are evaluations of one quantization as one, at the place of the first.

    A row of several has the sum of their seconds of evaluation, the largest of their peaks of memory, and a series of its
    own, which is the same for every seed that was evaluated so.
    """
    rows: list[Run] = []
    by_codes: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        if (codes := _codes(run)) is None:
            rows.append(run)
            continue
        alike = by_codes.setdefault(codes, [])
        row = next((each for each in alike if _agree(each, run)), None)
        if row is None:
            alike.append(run := dict(run))
            rows.append(run)
        else:
            _add(row, run)
    return rows


def _codes(run: Run) -> tuple[Any, ...] | None:
    """What runs must share to be evaluations of one quantization; None for a run that shares nothing."""
    if run["status"] != Status.DONE or not isinstance(run.get(QUANTIZATION), str):
        return None
    return run[QUANTIZATION], run.get(CHECKPOINT_SHA256), run["device"]


def _agree(row: Run, run: Run) -> bool:
    """Whether the two have measured whatever both have measured in the same way."""
    return all(row.get(key, run[key]) == run[key] for key in _how(run))


def _how(run: Run) -> Iterable[str]:
    of_texts = (key for family in HOW for key in metrics.keys_of(run, family))
    of_tasks = (key for key in run if (parts := metrics.zero_shot_parts(key)) and parts[1] in MEASURED_HOW)
    return (*of_texts, *of_tasks)


def _add(row: Run, run: Run) -> None:
    added: Run = {key: row.get(key, 0.0) + run.get(key, 0.0) for key in SUMMED if key in row or key in run}
    added |= {key: max(row.get(key, -math.inf), run[key]) for key in LARGEST if key in run}
    series = "+".join(sorted({*str(row["series"]).split("+"), str(run["series"])}))
    more = [*row.get(MORE, []), run["folder"]]
    names = [key for key in run if key not in row or row[key] is None]
    row.update({key: run[key] for key in names} | added | {"series": series, MORE: more})
