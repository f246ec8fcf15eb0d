"""Time layers and whole models; write results/benchmark/<machine>/: layers.csv, models.csv, machine.json and figures.

python -m runners.benchmark                            what suits the machine: minutes
python -m runners.benchmark --largest 768 --models     layers up to OPT-125m's, no whole model
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from runners.benchmark import layers, models
from runners.benchmark.figures import draw
from runners.benchmark.machine import Rates
from runners.run.environment import environment
from runners.storage.files import write


def main() -> None:
    """Run what the command line asks for."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = _options(device)
    facts = environment(device)
    machine = facts["device"] if device.type == "cuda" else f"{facts['processor']} {facts['threads']} threads"
    folder = options.results / "benchmark" / re.sub(r"\W+", "-", machine.lower()).strip("-")
    with torch.no_grad():
        rates = Rates.measure(device)
        write(folder / "machine.json", json.dumps(facts | {"rates": vars(rates)}, indent=2) + "\n")
        print(f"{machine}: {rates}", flush=True)
        rows = []
        for shape in layers.shapes(options.largest):
            rows.append(layers.measure(*shape, rates, device))
            _report(rows, folder / "layers.csv")
        rows = []
        for name in options.models:
            for method in models.METHODS:
                rows.append(models.measure(name, method, options.sequences, options.length, device))
                _report(rows, folder / "models.csv")
    draw(folder, machine)
    print(f"written to {folder}")


def _options(device: torch.device) -> argparse.Namespace:
    gpu = device.type == "cuda"
    parser = argparse.ArgumentParser(prog="python -m runners.benchmark", description="Time layers and whole models.")
    parser.add_argument("--largest", type=int, default=9216 if gpu else 768, help="width of the largest model's layers")
    parser.add_argument("--models", nargs="*", choices=models.DEPTHS, default=["1.3b", "13b"] if gpu else ["125m"])
    parser.add_argument("--sequences", type=int, default=128 if gpu else 8, help="of calibration, for whole models")
    parser.add_argument("--length", type=int, default=2048 if gpu else 512, help="tokens of a sequence")
    parser.add_argument("--results", type=Path, default=Path("results"))
    return parser.parse_args()


def _report(rows: list[dict[str, Any]], file: Path) -> None:
    """Print the newest row, and write the table so far: what is measured is not lost."""
    shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in rows[-1].items()}
    print(" ".join(f"{key}={value}" for key, value in shown.items()), flush=True)
    write(file, pd.DataFrame(rows).to_csv(index=False))


if __name__ == "__main__":
    main()
