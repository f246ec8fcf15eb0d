"""The files of conf/experiment: each says what it shows, costs and should give, composes, and runs small."""

import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from runners.config.command_line import check
from runners.config.settings import Settings
from runners.fetch.packages import MODELS, is_here
from runners.run.experiment import run_cell
from tests.conftest import PROJECT

FILES = {file.stem: file for file in sorted((PROJECT / "conf" / "experiment").glob("*.yaml"))}
LARGE = {"tiny", "smollm2", "best"}  # studies of one model by itself, an hour long
SMALL = 20  # cells at most of any other with model=tiny: some ten minutes on 2 cores
PUBLISHED = {  # WikiText-2 in the README of the authors' code: full, 4 bits, 3 bits, then 1 % of the columns, of the weights
    "opt-1.3b": (14.62, 15.28, 21.30, 18.51, 16.25),
    "opt-13b": (10.13, 10.32, 12.41, 12.07, 10.37),
    "bloom-1b7": (15.39, 16.11, 20.03, 18.89, 17.06),
    "bloom-7b1": (11.37, 11.69, 13.43, 12.97, 12.03),
    "falcon-7b": (6.59, 6.92, 8.83, 8.56, 7.14),
    "falcon-40b": (5.23, 5.46, 6.20, 5.99, 5.51),
}


def header(name: str) -> str:
    """The comment at the head of an experiment's file."""
    return re.match(r"(#.*\n)+", FILES[name].read_text(encoding="utf-8"))[0]  # pyright: ignore[reportOptionalSubscript]


def commands(name: str) -> list[list[str]]:
    """What follows `python run.py` in every command of the header."""
    return [shlex.split(line) for line in re.findall(r"python run\.py (.*)", header(name))]


@cache
def cells(name: str, *overrides: str) -> list[Settings]:
    return check([f"experiment={name}", *overrides], multirun=True)


def test_every_table_of_the_paper_has_its_file() -> None:
    paper = {f"{family}_3_4_bits" for family in ("opt", "bloom", "falcon")} | {"outliers_3_bits", "outliers_2_bits"}
    paper |= {"lambada", "layer_error", "iterations", "run_time"}
    left_out = {"groups", "seeds", "act_order", "grid_range", "true_sequential", "calibration_inputs", "newer_models"}
    assert set(FILES) >= paper | left_out | LARGE


@pytest.mark.parametrize("name", FILES)
def test_the_header_says_what_it_costs_and_what_to_expect(name: str) -> None:
    lines = header(name).splitlines()
    assert lines[0] == "# @package _global_"
    for label in ("command", "cost", "expect", *([] if name in LARGE else ["small"])):
        assert sum(line.startswith(f"# {label}:") for line in lines) == 1, label
    assert f"# command: python run.py -m experiment={name}\n" in header(name)
    assert max(map(len, lines)) <= 125


@pytest.mark.parametrize("name", FILES)
def test_every_command_in_a_header_is_valid(name: str) -> None:
    for arguments in commands(name):
        assert arguments[:2] == ["-m", f"experiment={name}"]
        assert cells(name, *arguments[2:])


@pytest.mark.parametrize("name", FILES)
def test_an_experiment_has_no_cell_twice_and_says_how_many(name: str) -> None:
    full = cells(name)
    for model in {cell.run.model.name for cell in full} & MODELS.keys():
        if not is_here(model):
            pytest.skip(f"the digests of {model} need its file: python -m runners.fetch {model}")
    assert {cell.execution.study for cell in full} == {name}
    runs = {(cell.run.model.name, cell.digest) for cell in full}
    assert name in LARGE or len(runs) == len(full)
    assert re.search(rf"# cost: +{len(runs)} (cells|runs)", header(name))


@pytest.mark.parametrize("name", [name for name in FILES if name not in LARGE])
def test_with_the_bundled_model_everything_is_small_and_at_hand(name: str) -> None:
    small = cells(name, "model=tiny")
    assert {cell.run.model.name for cell in small} == {"tiny"}
    assert {cell.run.calibration and cell.run.calibration.name for cell in small} == {"stdlib"}
    assert {tuple(cell.run.evaluation.texts) for cell in small} == {("stdlib_docs", "stdlib_source")}
    assert {cell.run.group_size for cell in small} <= {None, 16, 32, 64}  # divide the bundled model's rows
    assert 2 <= len(small) <= SMALL


@pytest.mark.parametrize("name", [name for name in FILES if name not in LARGE])
def test_hub_models_take_the_papers_data(name: str) -> None:
    full = cells(name)
    assert {cell.run.calibration and cell.run.calibration.name for cell in full} == {"c4"}
    assert {tuple(cell.run.evaluation.texts) for cell in full} == {("wikitext2", "c4", "ptb")}


@pytest.mark.parametrize("name", [f"{family}_3_4_bits" for family in ("opt", "bloom", "falcon")])
def test_the_papers_numbers_stand_under_their_models(name: str) -> None:
    """A column a model, in the order of the sweep; a number that nobody published leaves a gap."""
    models = dict.fromkeys(cell.run.model.name for cell in cells(name))
    heads = {match[0]: match.end() for match in re.finditer(r"[\w.]+(?=  |$)", table_line(name, "expect:"))}
    for row, place in {"full": 0, "QuantEase 4": 1, "QuantEase 3": 2}.items():
        line = table_line(name, row)
        for model in models:
            if model in PUBLISHED and not (row == "full" and model == "opt-1.3b"):  # GPTQ's paper has 14.63
                end = heads[model.partition("-")[2]]
                assert line[:end].split()[-1] == f"{PUBLISHED[model][place]:.2f}", (row, model)


@pytest.mark.parametrize(
    ("name", "row", "place"),
    [("outliers_3_bits", "columns", 3), ("outliers_3_bits", "weights", 4), ("true_sequential", "QuantEase 3 bits", 2)],
)
def test_the_papers_numbers_stand_in_the_order_of_the_models(name: str, row: str, place: int) -> None:
    models = dict.fromkeys(cell.run.model.name for cell in cells(name))
    numbers = re.findall(r"\d+\.\d\d", table_line(name, row))
    assert numbers == [f"{PUBLISHED[model][place]:.2f}" for model in models]


def table_line(name: str, start: str) -> str:
    return next(line for line in header(name).splitlines() if line[2:].strip().startswith(start)).split("(")[0].rstrip()


@pytest.mark.parametrize("name", ["outliers_2_bits", "iterations"])
def test_an_experiment_really_runs_small(name: str, toy_model: Path, data_root: Path, tmp_path: Path) -> None:
    toy = ["model=local", f"model.path={toy_model}", f"data_root={data_root}", f"results={tmp_path}", "tracker=none"]
    toy += ["calibration=c4", "calibration.num_sequences=4", "evaluation=wikitext2"]
    for settings in cells(name, *toy)[:2]:
        row = run_cell(settings)
        assert row["status"] == "done", row.get("error")
        assert row["study"] == name
        assert row["ppl/wikitext2"] > 1
