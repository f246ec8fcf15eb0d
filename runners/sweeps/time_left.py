"""How long the cells of a study that are left will take, from those that are done and alike.

    seconds of a cell = start + quantization + evaluation + zero-shot tasks

each as the mean over the done cells of its model that are most alike: first those that differ in the seed alone, else those
of its method, grid group and bits; of its method and group; of its method; of other methods, which is said. Of a running
cell its present stage counts by the share of steps that is not done. The workers are those that run now, and each takes the
next cell as soon as it is free. A cell of whose model none is done is not estimated, and that is said, too.
"""

import heapq
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from runners.console import duration
from runners.results.metrics import (
    EVALUATE_SECONDS,
    OPEN,
    QUANTIZE_SECONDS,
    REFERENCE,
    RUN_SECONDS,
    TASKS_LEFT,
    ZERO_SHOT_SECONDS,
    Status,
)
from runners.results.progress import share_done

Row = Mapping[str, Any]  # of a cell: its labels, and what `read_status` returns
START = "start"  # all that is neither of the other stages: loading, data, writing
STAGES = {"quantize": QUANTIZE_SECONDS, "evaluate": EVALUATE_SECONDS, "zero-shot": ZERO_SHOT_SECONDS}
ALIKE: tuple[
    tuple[str, ...], ...
] = (  # labels that done cells share with one that is left; the first that are found count
    ("series",),
    ("method", "group_size", "bits"),
    ("method", "group_size"),
    ("method",),
)


@dataclass(frozen=True)
class CellSeconds:
    """The seconds of a cell by its stages.

    Attributes:
        is_of_its_method: else the quantization is that of other methods.
    """

    stages: dict[str, float]
    is_of_its_method: bool


def time_left(rows: Sequence[Row]) -> str:
    """The time that the cells that are left will take, as a sentence that also says what is not known."""
    left = [row for row in rows if row["status"] in (*OPEN, Status.RUNNING) or TASKS_LEFT in row]
    if not left:
        return "nothing is left to do"
    done = [row for row in rows if row["status"] == Status.DONE]
    estimates = [(row, estimate) for row in left if (estimate := expected(row, done)) is not None]
    if not estimates:
        return "time left: unknown until a cell like those left is done"
    running = sum(row["status"] == Status.RUNNING for row in rows)
    seconds = makespan([remaining(row, estimate) for row, estimate in estimates], max(1, running))
    words = f"about {duration(seconds)} left with {max(1, running)} worker{'s' * (running > 1)}"
    return "; ".join([words, *_remarks(left, estimates, running)])


def expected(row: Row, done: Sequence[Row]) -> CellSeconds | None:
    """What a cell will take from its beginning; None where no done cell tells.

    Args:
        done: rows of cells that are done, of whatever model.
    """
    of_model = [one for one in done if one["model"] == row["model"]]
    if row["method"] != REFERENCE:  # the unquantized model tells nothing of quantization
        of_model = [one for one in of_model if one["method"] != REFERENCE]
    for labels in (*ALIKE, ()):
        alike = [one for one in of_model if _same(labels, row, one)]
        if alike:
            stages = {stage: fmean(_seconds(one)[stage] for one in alike) for stage in (START, *STAGES)}
            if row["method"] == REFERENCE:
                stages["quantize"] = 0.0
            whole = [one for one in alike if TASKS_LEFT not in one]  # tasks that memory was short for took no time
            stages["zero-shot"] = fmean(_seconds(one)["zero-shot"] for one in whole) if whole else 0.0
            return CellSeconds(stages, bool(labels) or row["method"] == REFERENCE)
    return None


def remaining(row: Row, estimate: CellSeconds) -> float:
    """The seconds that a cell still takes, from what it takes in all and how far it is."""
    stages = estimate.stages
    if TASKS_LEFT in row:
        return stages[START] + stages["zero-shot"]
    progress = row.get("progress")
    if row["status"] != Status.RUNNING or not progress:
        return sum(stages.values())
    order = [START, *STAGES]
    stage = progress["stage"] if progress["stage"] in STAGES else START
    if progress["stage"] == "clear":
        return 0.0
    later = sum(stages[name] for name in order[order.index(stage) + 1 :])
    if (share := share_done(progress)) is not None and stage != "zero-shot":  # each task counts its own steps
        return later + stages[stage] * max(0.0, 1 - share)
    since = time.time() - progress.get("stage_started", progress["started"])
    return later + max(0.0, stages[stage] - max(0.0, since))


def makespan(seconds: Sequence[float], workers: int) -> float:
    """When the last of the cells ends, each taken by the first worker that is free, in their order."""
    free = [0.0] * workers
    for each in seconds:
        heapq.heapreplace(free, free[0] + each)
    return max(free)


def _seconds(row: Row) -> dict[str, float]:
    """The seconds of a done cell by its stages."""
    stages = {stage: float(row.get(key) or 0.0) for stage, key in STAGES.items()}
    return {START: max(0.0, (row.get(RUN_SECONDS) or 0.0) - sum(stages.values()))} | stages


def _same(labels: Sequence[str], row: Row, other: Row) -> bool:
    """Whether both cells have these labels, and alike; lists of cells of older versions lack some."""
    return all(name in row and name in other and row[name] == other[name] for name in labels)


def _remarks(left: Sequence[Row], estimates: Sequence[tuple[Row, CellSeconds]], running: int) -> list[str]:
    unlike = sum(not estimate.is_of_its_method for _, estimate in estimates)
    unknown = len(left) - len(estimates)
    remarks = {
        "nothing is running": running == 0,
        f"{_cells(unlike)} by the time of other methods": unlike > 0,
        f"{_cells(unknown)} not counted, as none of their model is done": unknown > 0,
    }
    return [words for words, is_so in remarks.items() if is_so]


def _cells(count: int) -> str:
    return f"{count} cell{'s' * (count != 1)}"
