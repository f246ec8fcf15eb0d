"""What every method makes of the layer-wise objective, relative to GPTQ: the hardest layers of a model, and random ones.

python -m runners.benchmark.objectives                 the bundled model: minutes; writes results/benchmark/objectives/

Layers see the inputs that GPTQ's quantized blocks give them (3 bits, per-channel), the same for all methods. So what is
compared is the solvers alone, on equal problems, before any of their errors meets another layer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import geometric_mean
from typing import Annotated, Any, cast

import pandas as pd
import torch
from torch import Tensor

from baselines.gptq import GPTQ
from quantease.grid import GridSpec
from quantease.layer import LayerProblem, LayerSolver, QuantizedLayer, Unsupported, objective
from runners.arguments import start
from runners.benchmark.layers import random_layer
from runners.config.command_line import check
from runners.models.streaming import open_model
from runners.project import CONF, results_folder
from runners.quantization.calibration_activations import CalibrationActivations
from runners.quantization.layerwise import Quantization
from runners.quantization.paired_inputs import PairedInputs
from runners.results.layers import LayerRecord
from runners.run.preflight import preflight
from runners.storage.files import write
from runners.timing import clock

HARDEST = 10  # layers of the model, by GPTQ's relative error
RANDOM = 4  # random problems
LOST = 0.05  # of a random problem's inputs, relative to their size
SPECS = [GridSpec(bits, group_size) for group_size in (None, 64) for bits in (2, 3, 4)]


@dataclass(frozen=True)
class Collector(LayerSolver):
    """GPTQ, which keeps the problems that it is given."""

    problems: list[LayerProblem] = field(default_factory=list)

    @property
    def needs_cross(self) -> bool:
        return True

    def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
        self.problems.append(problem)
        return GPTQ().solve(problem, spec)


def main(
    model: Annotated[str, "a file of conf/model/"] = "tiny",
    methods: Annotated[tuple[str, ...], "files of conf/method/; all by default"] = (),
    results: Annotated[Path | None, "folder of all studies (default: results/ of the project)"] = None,
) -> None:
    """Solve the hardest layers of a model, and random ones, with every method; write results/benchmark/objectives/."""
    names = methods or tuple(sorted(path.stem for path in (CONF / "method").glob("*.yaml")))
    solvers = {name: solver for name in names if (solver := _solver(name)) is not None}
    folder = (results or results_folder()) / "benchmark" / "objectives"
    with torch.no_grad():
        problems = dict(hardest_layers(model)) | dict(random_problems())
        rows = [row for name, problem in problems.items() for row in measure(name, problem, SPECS, solvers)]
    table = pd.DataFrame(rows)
    write(folder / f"{model}.csv", table.to_csv(index=False, float_format="%.6g"))
    summary = summarize(table)
    write(folder / f"{model}.md", f"{CAPTION}\n\n{summary.to_markdown(index=False, floatfmt='.3f')}\n")
    print(summary.to_string(index=False, float_format="{:.3f}".format))
    print(f"written to {folder}")


CAPTION = (
    "Objective tr(D H D^T) relative to GPTQ's on the same layer and grid, geometric mean over the layers. `towards X` is "
    "the change against GPTQ of the distance to the unquantized model's outputs, which methods with paired inputs lower, in "
    "units of GPTQ's objective: below zero is better. Solvers alone, before their errors meet other layers."
)


def _solver(name: str) -> LayerSolver | None:
    """The method's solver; None for files that do not solve layers."""
    (settings,) = check([f"method={name}"], multirun=False)
    return settings.run.method.solver


def hardest_layers(model: str) -> Iterator[tuple[str, LayerProblem]]:
    """The layers on which GPTQ's relative error at 3 bits is the largest, with both models' inputs; the hardest first."""
    (settings,) = check(["method=gptq", f"model={model}", "tracker=none"], multirun=False)
    inputs = preflight(settings)
    assert inputs.sequences is not None
    source, collector = open_model(inputs.checkpoint, settings.run.model, inputs.device), Collector()
    original = CalibrationActivations(source, inputs.sequences.used, inputs.batch_size)
    activations = CalibrationActivations(source, inputs.sequences.used, inputs.batch_size, in_step=original)
    records: list[LayerRecord] = []
    Quantization(PairedInputs(activations, original), collector, GridSpec(3)).run(records.append)
    solved = [record for record in records if not record.left_alone]
    pairs = sorted(zip(solved, collector.problems, strict=True), key=lambda pair: -(pair[0].relative_error or 0.0))
    for record, problem in pairs[:HARDEST]:
        yield f"{record.block}.{record.layer}", problem


def random_problems() -> Iterator[tuple[str, LayerProblem]]:
    """Ill-conditioned layers (256 x 512) whose inputs have lost a part, and taken up noise, in the blocks before."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for seed in range(RANDOM):
        weight, moment = random_layer(256, 512, device, seed)
        x = torch.linalg.cholesky(moment + 1e-6 * moment.diagonal().mean() * torch.eye(512, device=device)).T
        g = torch.Generator(device=device).manual_seed(seed)
        sizes = moment.diagonal().sqrt()
        quantized = x * (1 - LOST) + LOST * torch.randn(512, 512, generator=g, device=device) * sizes / 512**0.5
        hessian, cross = quantized.T @ quantized, (x - quantized).T @ quantized
        mean_input = (2 / torch.pi) ** 0.5 * hessian.diagonal().sqrt()
        yield f"random {seed}", LayerProblem(weight, hessian, mean_input=mean_input, cross=cross, cross_half=cross / 2)


def measure(
    name: str, problem: LayerProblem, specs: Sequence[GridSpec], solvers: dict[str, LayerSolver]
) -> Iterator[dict[str, Any]]:
    """One row per grid and method; a method that cannot do it has none.

    `objective` and `seconds` are relative to GPTQ's, `towards_x` is (P - P of GPTQ) / GPTQ's objective for the distance
    P = ||W X - W_hat X^||^2, which is 2 tr(W C D^T) + tr(D H D^T) but for what no answer changes.
    """
    for spec in specs:
        if not spec.divides(problem.weight.shape[1]):
            continue
        _answer(GPTQ(), problem, spec)  # the first may have compiled something
        base = _answer(GPTQ(), problem, spec)
        assert base is not None
        for method, solver in solvers.items():
            if (answer := _answer(solver, problem, spec)) is None:
                continue
            yield {
                "layer": name,
                "kind": "random" if name.startswith("random") else "model",
                "bits": spec.bits,
                "group_size": spec.group_size,
                "method": method,
                "objective": answer["objective"] / base["objective"],
                "towards_x": (answer["distance"] - base["distance"]) / base["objective"],
                "bits_per_weight": answer["bits_per_weight"],
                "seconds": answer["seconds"] / base["seconds"],
            }


def _answer(solver: LayerSolver, problem: LayerProblem, spec: GridSpec) -> dict[str, float] | None:
    """The two distances of a method's answer, its bits and its seconds; None: it has no answer."""
    device = problem.weight.device
    begin = clock(device)
    try:
        answer = solver.solve(problem, spec)
    except Unsupported:
        return None
    difference = problem.weight - answer.weight
    reached = objective(difference, problem.hessian)
    seconds = clock(device) - begin
    return {
        "objective": reached,
        "distance": reached + 2 * _lost(problem, difference),
        "bits_per_weight": answer.bits_per_weight,
        "seconds": seconds,
    }


def _lost(problem: LayerProblem, difference: Tensor) -> float:
    """tr(W C D^T)."""
    if problem.cross is None:
        return 0.0
    return (problem.weight @ problem.cross * difference).sum(dtype=torch.float64).item()


def summarize(table: pd.DataFrame) -> pd.DataFrame:
    """One row per method: geometric means of the objective for each kind of layer and grid, and over all of them."""
    rows = []
    for method, of_method in table.groupby("method"):
        row: dict[str, Any] = {"method": method}
        for keys, cell in of_method.groupby(["kind", "group_size", "bits"], dropna=False):
            kind, group, bits = cast(tuple[str, float, int], keys)
            grid = "per-channel" if pd.isna(group) else f"group {group:.0f}"
            row[f"{kind}, {bits} bits, {grid}"] = geometric_mean(cell["objective"].clip(lower=1e-12))
        row["all"] = geometric_mean(of_method["objective"].clip(lower=1e-12))
        row["towards X"] = of_method["towards_x"].mean()
        row["bits per weight at 3, per-channel"] = of_method.query("bits == 3 and group_size != group_size")[
            "bits_per_weight"
        ].mean()
        row["seconds"] = geometric_mean(of_method["seconds"])
        rows.append(row)
    return pd.DataFrame(rows).sort_values("all")


if __name__ == "__main__":
    start(main)
