"""What a long run says where there is no terminal, and what others see of it meanwhile."""

import re

import pytest

from runners import console
from runners.console import Bar, Pace, duration, progress
from runners.quoting import printable
from runners.results.run_log import RUN_LOG
from runners.run.experiment import run_cell
from tests.conftest import ToySettings


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines on progress, as run.log gets them."""
    said: list[str] = []
    monkeypatch.setattr(console, "scribe", said.append)
    return said


def test_the_time_left_is_that_of_the_parts_measured_here() -> None:
    clock = Clock()
    pace = Pace(clock)
    clock.now = 10.0
    assert pace.finish(1, 5) == 10.0
    assert pace.left == 40.0  # all that is known
    clock.now = 12.0
    pace.finish(2, 5)
    assert pace.left == 6.0  # without the first, in which compilers warm up
    clock.now = 13.0
    assert pace.left == 5.0


def test_parts_of_unlike_size_count_by_what_they_are_made_of() -> None:
    clock = Clock()
    pace = Pace(clock)
    clock.now = 32.0
    assert pace.finish(64, 66, size=64) == 32.0  # a text of 64 windows
    assert pace.left == 1.0  # two probes of one window each, and not twice the time of the text


def test_after_a_resume_only_the_parts_of_this_process_count() -> None:
    clock = Clock()
    pace = Pace(clock)
    clock.now = 100.0  # the way through the 18 blocks before
    pace.finish(19, 24)
    assert pace.left is None
    clock.now = 103.0
    pace.finish(20, 24)
    assert pace.left == 12.0


def test_a_line_for_each_part_with_the_time_left(lines: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    bar = Bar("quantize gptq", 48, lambda _done, _words: None, clock)
    bar.begin("the evaluation")
    for block in range(1, 4):
        bar("fc1")
        clock.now += 41.0 if block == 3 else 40.0
        bar.finish(f"block {block} of 24", block, 24)
    assert lines[-1] == "quantize gptq: block 3 of 24, 41 s, about 14 min left, then the evaluation"
    assert capsys.readouterr().out.splitlines() == lines


def test_a_small_model_has_no_hundreds_of_lines_but_always_the_last(lines: list[str]) -> None:
    clock = Clock()
    bar = Bar("evaluate rtn", 500, lambda _done, _words: None, clock)
    bar.begin()
    for block in range(1, 501):
        clock.now += 0.01
        bar.finish(f"block {block} of 500", block, 500)
    assert 5 <= len(lines) <= 7
    assert lines[-1] == "evaluate rtn: block 500 of 500, 0.0 s"


def test_a_part_that_takes_long_shows_its_steps(lines: list[str]) -> None:
    clock = Clock()
    bar = Bar("evaluate rtn", 300, lambda _done, _words: None, clock)
    bar.begin()
    for window in range(1, 101):
        clock.now += 1.0
        bar(f"block 1/2  wikitext2, window {window} of 100")
    assert lines == [
        f"evaluate rtn: block 1/2 wikitext2, window {window} of 100, {window} of 300 steps" for window in (30, 60, 90)
    ]


def test_a_stage_without_parts_shows_its_last_step_when_it_ends(lines: list[str]) -> None:
    with progress("zero-shot piqa", 3) as bar:
        for _ in range(3):
            bar("zero-shot piqa")
        assert not lines
    assert len(lines) == 1
    assert lines[0].startswith("zero-shot piqa: 3 of 3 steps, ")


def test_a_stage_that_fails_shows_how_far_it_came(lines: list[str]) -> None:
    def fail() -> None:
        with progress("quantize rtn", 3) as bar:
            bar.begin()
            bar.finish("block 1 of 3", 1, 3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert "block 1 of 3" in lines[-1]


def test_no_control_characters_even_where_colors_are_forced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(console.console, "_force_terminal", True)
    with progress("quantize \x1b[2J\r", 2) as bar:
        bar.begin()
        bar("fc1")
        bar.finish("block 1 of 1", 1, 1)
    shown = capsys.readouterr().out
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", shown)
    assert shown.startswith("quantize \\x1b[2J\\r: block 1 of 1, ")


def test_the_evaluation_tells_which_window_of_which_text(
    toy_settings: ToySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int, int]] = []
    follow = console.Bar.__call__

    def spy(bar: Bar, description: str, done: int | None = None) -> None:
        follow(bar, description, done)
        seen.append((description, bar.done, bar._total))

    monkeypatch.setattr(console.Bar, "__call__", spy)
    settings = toy_settings("method=rtn", "batch_size=2")
    assert run_cell(settings)["status"] == "done"
    evaluated = [step for step in seen if "window" in step[0]]
    assert evaluated[0][0].startswith("block 1/2  wikitext2 unquantized, window 2 of ")
    assert re.fullmatch(r"wikitext2, window (\d+) of \1", evaluated[-1][0])
    done = [step[1] for step in evaluated]
    assert done == sorted(done)
    assert done[-1] == evaluated[-1][2]  # it has come to its end
    text = (settings.folder / RUN_LOG).read_text()
    assert "quantize rtn, 3 bits: block 2 of 2, " in text
    assert "evaluate rtn, 3 bits: wikitext2 measured, " in text


def test_durations_show_two_digits() -> None:
    assert [duration(seconds) for seconds in (0.26, 9.96, 45.4, 720, 12_000)] == [
        "0.3 s",
        "10 s",
        "45 s",
        "12 min",
        "3 h 20 min",
    ]


def test_what_is_not_printable_is_escaped() -> None:
    assert printable("a\r\n\x1b[2Jé\u202e") == "a\\r\\n\\x1b[2Jé\\u202e"
