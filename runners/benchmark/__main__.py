"""Time layers and whole models; write results/benchmark/<machine>/: layers.csv, models.csv, machine.json and figures.

python -m runners.benchmark                            what suits the machine: minutes
python -m runners.benchmark --largest 768 --models     layers up to OPT-125m's, no whole model
"""

import json
import re
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch

from runners.arguments import start
from runners.benchmark.figures import draw
from runners.benchmark.layers import measure_layer, shapes
from runners.benchmark.machine import Rates
from runners.benchmark.models import METHODS, Size, measure_model
from runners.project import results_folder
from runners.run.environment import environment
from runners.storage.files import write

GPU = torch.cuda.is_available()
# A run should take minutes: on a GPU the shapes of the papers, on CPU cores the smallest model of OPT and few tokens.
LARGEST = 9216 if GPU else 768
MODELS: tuple[Size, ...] = ("1.3b", "13b") if GPU else ("125m",)
SEQUENCES, LENGTH = (128, 2048) if GPU else (8, 512)


def main(
    largest: Annotated[int, "width of the largest model whose layers are timed"] = LARGEST,
    models: Annotated[tuple[Size, ...], "sizes of OPT to quantize as a whole; --models alone: none"] = MODELS,
    sequences: Annotated[int, "calibration sequences of the whole models"] = SEQUENCES,
    length: Annotated[int, "tokens per sequence"] = LENGTH,
    results: Annotated[Path | None, "folder of all studies (default: results/ of the project)"] = None,
) -> None:
    """Time the layers of OPT and whole models of random weights; write results/benchmark/<machine>/."""
    device = torch.device("cuda" if GPU else "cpu")
    facts = environment(device)
    machine = facts["device"] if GPU else f"{facts['processor']} {facts['threads']} threads"
    folder = (results or results_folder()) / "benchmark" / re.sub(r"\W+", "-", machine.lower()).strip("-")
    with torch.no_grad():
        rates = Rates.measure(device)
        write(folder / "machine.json", json.dumps(facts | {"rates": vars(rates)}, indent=2) + "\n")
        print(f"{machine}: {rates}", flush=True)
        _time_layers(folder, largest, rates, device)
        _time_models(folder, models, sequences, length, device)
    draw(folder, machine)
    print(f"written to {folder}")


def _time_layers(folder: Path, largest: int, rates: Rates, device: torch.device) -> None:
    rows: list[dict[str, Any]] = []
    for name, out_features, in_features in shapes(largest):
        rows.append(measure_layer(name, out_features, in_features, rates, device))
        _report(rows, folder / "layers.csv")


def _time_models(folder: Path, sizes: tuple[Size, ...], sequences: int, length: int, device: torch.device) -> None:
    rows: list[dict[str, Any]] = []
    for size in sizes:
        for method in METHODS:
            rows.append(measure_model(size, method, sequences, length, device))
            _report(rows, folder / "models.csv")


def _report(rows: list[dict[str, Any]], file: Path) -> None:
    """Print the newest row, and write the table so far: an interrupted benchmark keeps what it has measured."""
    shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in rows[-1].items()}
    print(" ".join(f"{key}={value}" for key, value in shown.items()), flush=True)
    write(file, pd.DataFrame(rows).to_csv(index=False))


if __name__ == "__main__":
    start(main)
