"""The table of objectives: GPTQ is its unit, and the hardest layers of the bundled model are its problems."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from baselines.gptq import GPTQ
from baselines.rtn import RTN
from quantease.grid import GridSpec
from runners.benchmark import objectives
from runners.benchmark.objectives import measure, random_problems, summarize


def test_gptq_is_the_unit_and_distances_are_those_of_the_outputs() -> None:
    name, problem = next(random_problems())
    rows = list(measure(name, problem, [GridSpec(3), GridSpec(3, group_size=100)], {"gptq": GPTQ(), "rtn": RTN()}))
    assert [row["method"] for row in rows] == ["gptq", "rtn"]  # 100 does not divide the columns
    assert rows[0]["objective"] == 1
    assert rows[0]["towards_x"] == 0
    assert rows[1]["objective"] > 1
    (row,) = summarize(pd.DataFrame(rows)).query("method == 'gptq'").to_dict("records")
    assert row["random, 3 bits, per-channel"] == row["all"] == 1


def test_the_change_of_the_distance_needs_no_activations() -> None:
    """||W X - W_hat X^||^2 of two answers, from the activations themselves."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 16, generator=g)
    quantized = 0.8 * x + 0.1 * torch.randn(64, 16, generator=g)
    weight = torch.randn(8, 16, generator=g)
    problem = objectives.LayerProblem(weight, quantized.T @ quantized, cross=(x - quantized).T @ quantized)
    answers = {"rtn": RTN(), "gptq": GPTQ()}
    distances = {
        name: (x @ weight.T - quantized @ solver.solve(problem, GridSpec(3)).weight.T).square().sum().item()
        for name, solver in answers.items()
    }
    difference = weight - GPTQ().solve(problem, GridSpec(3)).weight
    unit = objectives.objective(difference, problem.hessian)
    rows = {row["method"]: row for row in measure("layer", problem, [GridSpec(3)], answers)}
    expected = (distances["rtn"] - distances["gptq"]) / unit
    assert rows["rtn"]["towards_x"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_the_command_writes_its_tables(tmp_path: Path) -> None:
    objectives.main(methods=("gptq", "quantease"), results=tmp_path)
    table = pd.read_csv(tmp_path / "benchmark" / "objectives" / "tiny.csv")
    assert len(table.query("kind == 'model'")["layer"].unique()) == objectives.HARDEST
    assert set(table.query("method == 'gptq'")["objective"]) == {1.0}
