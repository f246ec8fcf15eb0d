"""The time left of a study: from cells that are alike, stage by stage, and unknown where nothing is known."""

import time
from typing import Any

import pytest

from runners.sweeps.time_left import makespan, time_left

RTN = {"model": "toy", "method": "rtn", "group_size": None, "bits": 3, "series": "a"}
DONE = RTN | {"status": "done", "quantize/seconds": 60.0, "evaluate/seconds": 30.0, "zero_shot/seconds": 10.0}
LEFT = RTN | {"status": "missing"}
NOW = 1e9
FULL = {"model": "toy", "method": "fp16", "series": "f"}


def running(stage: str, **progress: Any) -> dict[str, Any]:
    started = {"stage": stage, "started": NOW - 500, "stage_started": NOW - 4}
    return LEFT | {"status": "running", "progress": started | progress}


@pytest.fixture(autouse=True)
def stop_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: NOW)


def test_nothing_left_and_nothing_known() -> None:
    assert time_left([DONE]) == "nothing is left to do"
    assert time_left([LEFT]) == "time left: unknown until a cell like those left is done"
    other = DONE | {"model": "large"}
    assert time_left([other, LEFT, LEFT]) == "time left: unknown until a cell like those left is done"


@pytest.mark.parametrize(
    ("change", "seconds"),
    [
        ({"series": "a"}, "100 s"),  # all but its seed
        ({"series": "b"}, "100 s"),  # method, group and bits
        ({"series": "b", "bits": 4}, "100 s"),
        ({"series": "b", "group_size": 64}, "10 s"),
    ],
)
def test_the_cells_that_are_most_alike_count(change: dict[str, Any], seconds: str) -> None:
    quick = {"quantize/seconds": 4.0, "evaluate/seconds": 3.0, "zero_shot/seconds": 3.0}
    grouped = DONE | quick | {"series": "c", "group_size": 64}
    slow = DONE | {"method": "gptq", "quantize/seconds": 5000.0, "series": "d"}
    words = time_left([DONE, grouped, slow, LEFT | change])
    assert words.startswith(f"about {'2 min' if seconds == '100 s' else seconds} left with 1 worker"), words


def test_another_method_is_said_and_another_model_is_not_counted() -> None:
    new = LEFT | {"method": "new", "series": "n"}
    assert time_left([DONE, new]) == (
        "about 2 min left with 1 worker; nothing is running; 1 cell by the time of other methods"
    )
    large = [LEFT | {"model": "large"}] * 3
    assert time_left([DONE, LEFT, *large]) == (
        "about 2 min left with 1 worker; nothing is running; 3 cells not counted, as none of their model is done"
    )


def test_the_unquantized_model_is_not_quantized_and_tells_nothing_of_it() -> None:
    assert time_left([DONE, FULL | {"status": "missing"}]).startswith("about 40 s left with 1 worker")
    measured = FULL | {"status": "done", "quantize/seconds": 0.0, "evaluate/seconds": 30.0}
    assert time_left([measured, LEFT]).startswith("time left: unknown")


@pytest.mark.parametrize(
    ("row", "seconds"),
    [
        (running("load"), "2 min"),
        (running("quantize", done=3, total=12), "85 s"),
        (running("quantize"), "96 s"),
        (running("evaluate", done=50, total=100), "25 s"),
        (running("zero-shot", done=1, total=3), "6.0 s"),
        (running("clear"), "0.0 s"),
    ],
)
def test_of_a_running_cell_what_is_done_does_not_count(row: dict[str, Any], seconds: str) -> None:
    assert time_left([DONE, row]) == f"about {seconds} left with 1 worker"


def test_seconds_that_no_stage_has_count_too() -> None:
    assert time_left([DONE | {"run/seconds": 160.0}, *[LEFT] * 2]).startswith("about 5 min left")


def test_tasks_that_are_left_take_their_own_seconds() -> None:
    short = DONE | {"zero_shot/seconds": 0.1, "tasks_left": "not measured: piqa"}
    assert time_left([DONE, short]).startswith("about 10 s left")
    assert time_left([DONE, short, LEFT]).startswith("about 2 min left")


def test_workers_take_the_next_cell_when_they_are_free() -> None:
    assert makespan([4, 4, 10], 2) == 14
    assert makespan([10], 2) == 10  # one cell is not shared
    assert time_left([DONE, *[running("quantize", done=6, total=12)] * 2, *[LEFT] * 4]) == (
        "about 4 min left with 2 workers"
    )
