"""Made-up studies: run folders as the harness writes them, for tables and figures that no committed study has."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

SIZES = {"opt-125m": 125e6, "opt-1.3b": 1.3e9, "opt-13b": 13e9, "bloom-560m": 560e6}
METHODS = {"fp16": 1.0, "rtn": 1.6, "gptq": 1.15, "quantease": 1.1, "quantease_outlier": 1.04}  # how much each loses
WINDOWS = 40


def write_run(study: Path, name: str, windows: Any = None, **metrics: Any) -> Path:
    """One run's folder: metrics.json, and windows.csv if the losses of every text are given."""
    folder = study / str(metrics["model"]) / name
    folder.mkdir(parents=True)
    rows = [
        {"text": text, "window": i, "nll": nll}
        for text, values in (windows or {}).items()
        for i, nll in enumerate(values)
    ]
    write_table(folder / "windows.csv", rows)
    (folder / "metrics.json").write_text(json.dumps({"layers/mean_relative_error": 0.0} | metrics))
    return folder


def write_table(file: Path, rows: list[dict[str, Any]]) -> None:
    """A CSV file of the rows; none where there are none."""
    if rows:
        with file.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def write_study(study: Path, seeds: int = 2) -> Path:
    """Four models, five methods at 4 and 3 bits: perplexity, agreement, zero-shot, layers, sweeps; one run failed."""
    generator = np.random.default_rng(0)
    for model, size in SIZES.items():
        difficulty = math.log(60 * (size / 1e8) ** -0.25) + generator.normal(0, 0.3, WINDOWS)
        for method, factor in METHODS.items():
            for bits in [None] if method == "fp16" else [4, 3]:
                loss = (factor - 1) * (1 if bits == 4 else 2.5)
                for seed in range(1 if bits is None else seeds):
                    nll = difficulty + loss + generator.normal(0, 0.004, WINDOWS)
                    _write_done_run(study, model, method, bits, seed, loss, nll)
    write_run(
        study, "awq-3b-f", model="opt-13b", method="awq", bits=3, seed=0, status="failed", stage="quantize",
        reason="exception", error="OutOfMemoryError: <40 GB>",
    )  # fmt: skip
    return study


def _write_done_run(study: Path, model: str, method: str, bits: int | None, seed: int, loss: float, nll: Any) -> None:
    metrics = _common(model, method, bits, loss, nll) | (_quantized(bits, seed, loss) if bits else {})
    folder = write_run(study, f"{method}-{bits}b-{seed}", {"wikitext2": list(nll)}, **metrics)
    (folder / "environment.json").write_text(json.dumps({"device": "NVIDIA H200", "commit": "0123456789abcdef"}))
    if bits:
        errors = [(i, loss / 20 * (1 + i % 2)) for i in range(8)]
        layers = [{"block": i // 2, "layer": f"fc{i % 2 + 1}", "relative_error": error} for i, error in errors]
        energy = {"energy_max_over_median": 9.0, "energy_position": 0, "energy_position_share": 0.75}
        for row in layers:
            row |= {
                "held_out_error": row["relative_error"] * 1.3,
                "energy_top_percent": 0.1 + 0.2 * row["block"],
            } | energy
        write_table(folder / "layers.csv", layers)
    if method.startswith("quantease"):
        sweeps = [(i, loss / 20 * (1 + 1 / (i + 1))) for i in range(6)]
        rows = [{"block": 0, "layer": "fc1", "sweep": sweep, "relative_error": error} for sweep, error in sweeps]
        write_table(folder / "sweeps.csv", rows)


def _common(model: str, method: str, bits: int | None, loss: float, nll: Any) -> dict[str, Any]:
    """The metrics that every run has. Larger models answer more questions, and losses cost answers."""
    size = SIZES[model]
    return {
        "model": model,
        "method": method,
        "status": "done",
        "series": f"{model}{method}{bits}",
        "parameters": int(size),
        "ppl/wikitext2": float(np.exp(nll.mean())),
        "protocol/wikitext2": "gptq",
        "sha256/wikitext2": model[:3],  # of token ids: one per tokenizer
        "windows/wikitext2": WINDOWS,
        "bits_per_weight": bits + 0.01 if bits else 16.0,
        "outlier_ratio": 0.01 if method == "quantease_outlier" else 0.0,
        "quantize/seconds": size / 1e8 * (3 - METHODS[method]),
        "zero_shot/piqa/acc": 0.85 - loss / 10 - 0.2 * (1e8 / size) ** 0.3,
        "zero_shot/piqa/acc_stderr": 0.01,
        "zero_shot/piqa/samples": 1838,
        "zero_shot/piqa/version": "1.0",
        "zero_shot/piqa/sha256": "0123456789abcdef",
        "zero_shot/seconds": 12.0,
        "skipped/zero_shot/arc": "the data set is missing",
    }


def _quantized(bits: int, seed: int, loss: float) -> dict[str, Any]:
    return {
        "bits": bits,
        "seed": seed,
        "agreement/wikitext2/kl": loss / 3,
        "agreement/wikitext2/top1": 1 - loss / 4,
        "layers/mean_relative_error": loss / 20,
        "layers/mean_held_out_error": loss / 15,
        "layers/mean_token_error": loss / 12,
    }
