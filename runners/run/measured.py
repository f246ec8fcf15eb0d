"""What finished runs, of whatever study, have measured of a model on a machine: the basis of every estimate.

A run and a cell that is still to be run describe their work alike: by what `Settings.resolved` says, which the run keeps in
its `config.yaml`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from runners.results.metrics import METRICS, MODEL_PATH, REFERENCE, UNIFORM, Status, read
from runners.results.run_folder import RunFolder

OF_A_MODEL = ("path", "revision", "dtype", "sequence_length")  # what tells two models apart; its name does not
OF_A_GRID = ("symmetric", "grid_range", "act_order")
SAFE: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # omegaconf's own takes ten times as long
SWEEPS = "num_iters"  # the setting of a solver that says how many sweeps of equal length it makes


@dataclass(frozen=True)
class Machine:
    """Where a run is measured. A CPU is told by its processor, because its device is `cpu` whatever it is.

    Attributes:
        threads: of the CPU; they do not make two machines, but their runs are compared last.
    """

    device: str
    processor: str
    threads: int

    def is_same(self, other: "Machine") -> bool:
        """Whether times measured on the one tell something about the other."""
        return self.device == other.device and (self.device != "cpu" or self.processor == other.processor)


@dataclass(frozen=True)
class Work:
    """What a run does, as far as its time, its memory and its disk depend on it.

    Attributes:
        grid: the settings of OF_A_GRID, and those of layers of unlike treatment.
        solver: the settings of the method by name, those of an `init` as `init.name`; {} where nothing is quantized.
        sweeps: of the solver; 0: it makes none.
        mode: of calibration: the inputs, whether true-sequential, and the weights of tokens; () without calibration.
        sequences: that calibrate and are held out.
        texts: the settings of each evaluation text, by its name.
    """

    method: str
    bits: int | None
    group_size: int | None
    grid: tuple[Any, ...]
    solver: dict[str, Any]
    sweeps: int
    mode: tuple[Any, ...]
    sequences: int
    texts: dict[str, Any]
    tasks: tuple[str, ...]
    limit: int | None
    agreement: bool

    @property
    def quantizes(self) -> bool:
        """False for the unquantized model."""
        return self.method != REFERENCE


@dataclass(frozen=True)
class MeasuredRun:
    """A run that is done, with what it did and what that took."""

    work: Work
    metrics: Mapping[str, Any]
    threads: int


def work_of(settings: Mapping[str, Any]) -> Work:
    """The work of a run, from `Settings.resolved` or the content of a `config.yaml`, which may be of an older version.

    Raises:
        KeyError, TypeError, AttributeError: these are not the settings of a run.
    """
    method, calibration, evaluation = settings["method"], settings.get("calibration"), settings["evaluation"]
    quantizes = method["name"] != REFERENCE
    solver = _flat(method.get("solver") or {}) if quantizes else {}
    sweeps = solver.pop(SWEEPS, 0)
    mode, sequences = (), 0
    if quantizes and calibration:
        weights = calibration.get("token_weights", UNIFORM)
        mode = (calibration.get("inputs"), bool(calibration.get("true_sequential")), weights)
        sequences = calibration["num_sequences"] + calibration.get("held_out", 0)
    return Work(
        method["name"],
        settings.get("bits") if quantizes else None,
        settings.get("group_size") if quantizes else None,
        (*(settings.get(name) for name in OF_A_GRID), settings.get("layers") or None) if quantizes else (),
        solver,
        sweeps,
        mode,
        sequences,
        dict(evaluation["texts"]),
        tuple(evaluation.get("tasks") or ()),
        evaluation.get("limit"),
        bool(evaluation.get("agreement", True)),
    )


def model_of(settings: Mapping[str, Any]) -> tuple[Any, ...]:
    """What the settings of a run say of its model, wherever its files are."""
    return tuple(settings["model"].get(name) for name in OF_A_MODEL)


def measured_runs(results: Path, model: tuple[Any, ...], machine: Machine) -> list[MeasuredRun]:
    """All runs in the folder of all studies that are done, of this model, on this machine; damaged ones tell nothing.

    Args:
        model: from `model_of`.
    """
    found = (_measured(file.parent, model, machine) for file in sorted(results.glob(f"*/*/*/{METRICS}")))
    return [run for run in found if run is not None]


def _measured(folder: Path, model: tuple[Any, ...], machine: Machine) -> MeasuredRun | None:
    """The run in a folder, if it is one of these. The slowest to read, its settings, come last."""
    try:
        metrics = read(folder / METRICS)
        if metrics["status"] != Status.DONE or metrics.get(MODEL_PATH, model[0]) != model[0]:
            return None
        environment = RunFolder(folder).environment()
        there = Machine(environment["device"], environment.get("processor", ""), environment.get("threads", 0))
        if not machine.is_same(there):
            return None
        settings: Any = yaml.load((folder / "config.yaml").read_text(encoding="utf-8"), Loader=SAFE)
        return MeasuredRun(work_of(settings), metrics, there.threads) if model_of(settings) == model else None
    except Exception:  # whatever is wrong with another run is no reason not to list the cells of this command
        return None


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
