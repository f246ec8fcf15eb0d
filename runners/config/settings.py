"""The settings of a cell and the names derived from them: identity, digest, run name and folder."""

import dataclasses
import typing
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from quantease.act_order import ActOrder
from quantease.grid import GridSpec
from quantease.layer import LayerSolver
from runners.config.build import build, unknown_setting
from runners.data.calibration import Calibration
from runners.data.task_rows import task_version
from runners.data.windows import Evaluation
from runners.errors import InputError
from runners.identity import counts_if, digest_of, identifying_fields, identity_of, plain
from runners.models.checkpoint import Model
from runners.storage.fingerprint import checkpoint_fingerprint

GRID = ("bits", "group_size", "symmetric", "scale_bits", "grid_range")  # the settings of GridSpec, in its order


@dataclass(frozen=True)
class Method:
    """One file of `conf/method/`: a name and the solver it builds, None for the unquantized reference."""

    name: str
    solver: LayerSolver | None


@dataclass(frozen=True)
class Tracker:
    """One file of `conf/tracker/`.

    Attributes:
        name: `wandb`, `trackio` or `none`.
        project: of W&B; trackio's projects are the studies.
        entity: the user or team of W&B that owns the project; None: the user's default.
        mode: of W&B: `online`, `offline`, or None: online when logged in, else offline into the study's folder.
    """

    name: str
    project: str = "quantease-bench"
    entity: str | None = None
    mode: str | None = None

    def __post_init__(self) -> None:
        if self.name not in ("wandb", "trackio", "none"):
            raise ValueError(f"name must be wandb, trackio or none, not {self.name}")
        if self.name == "trackio" and find_spec("trackio") is None:
            raise ValueError(
                'name=trackio needs a package that is not installed: pip install "quantease-bench[dashboard]"'
            )
        if self.mode not in (None, "online", "offline"):
            raise ValueError(f"mode must be online, offline or null, not {self.mode}")


def _quantizes(run: "Run") -> bool:
    return run.method.solver is not None


@dataclass(frozen=True)
class Run:
    """What is computed: every field belongs to the run's identity, those that have no bearing on fp16 but for that one.

    The order of the fields is that of the labels by which the cells of a sweep are told apart.
    """

    method: Method
    model: Model
    evaluation: Evaluation
    calibration: Calibration = field(metadata=counts_if(_quantizes))
    act_order: bool = field(metadata=counts_if(_quantizes))
    seed: int = field(metadata=counts_if(_quantizes))
    bits: int = field(metadata=counts_if(_quantizes))
    group_size: int | None = field(metadata=counts_if(_quantizes))
    symmetric: bool = field(metadata=counts_if(_quantizes))
    scale_bits: int = field(metadata=counts_if(_quantizes))
    grid_range: str = field(metadata=counts_if(_quantizes))
    # It changes no number, but a run that has only recorded warnings must not answer for one that is to stop at them.
    warnings: str = field(metadata=counts_if(lambda run: _quantizes(run) and run.warnings != "record"))

    def __post_init__(self) -> None:
        if self.warnings not in ("record", "error"):
            raise ValueError(f"warnings must be record or error, not {self.warnings!r}")
        _ = self.grid  # refuses what GridSpec refuses

    @property
    def grid(self) -> GridSpec:
        """The grid that the method solves on."""
        return GridSpec(*(getattr(self, name) for name in GRID))

    @property
    def quantizes(self) -> bool:
        """False for the unquantized reference, which no setting of the grid or the calibration touches."""
        return _quantizes(self)

    @property
    def solver(self) -> LayerSolver:
        """The method's solver, in act-order if that is asked for."""
        if self.method.solver is None:
            raise ValueError(f"{self.method.name} does not quantize")
        return ActOrder(self.method.solver) if self.act_order else self.method.solver

    def identity(self, data_root: str | None) -> dict[str, Any]:
        """Everything that can change a number, and nothing else. Its hash names the run.

        Args:
            data_root: the folder of the data sets, whose files belong to the identity; None: the hub.
        """
        identity: dict[str, Any] = {}
        for name in identifying_fields(self):
            if name in GRID:  # as one entry, as in published results
                identity["grid"] = identity_of(self.grid)
            else:
                identity[name] = identity_of(getattr(self, name))
        if self.model.folder is not None:
            identity["model"]["path"] = checkpoint_fingerprint(self.model.folder)  # what is in it, not where it is
        return identity | {"data": self._data_versions(data_root)}

    def _data_versions(self, data_root: str | None) -> dict[str, str]:
        datasets = {name: text.dataset for name, text in self.evaluation.texts.items()}
        if self.quantizes:
            datasets["calibration"] = self.calibration.dataset
        versions = {name: dataset.version(data_root) for name, dataset in datasets.items()}
        return versions | {f"zero_shot/{name}": task_version(name, data_root) for name in self.evaluation.tasks}


@dataclass(frozen=True)
class Execution:
    """How and where it is computed: no field belongs to the run's identity."""

    tracker: Tracker
    study: str
    results: str
    data_root: str | None
    device: str | None
    batch_size: int | None
    cache: str | None
    cache_gb: float
    keep_checkpoint: bool
    force: bool
    retry_failed: bool
    timeout_minutes: float | None
    dry_run: bool

    def __post_init__(self) -> None:
        if not self.study or Path(self.study).name != self.study:
            raise ValueError(f"study must be the name of a folder, not {self.study!r}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")
        if self.cache_gb < 0:
            raise ValueError(f"cache_gb must not be negative, not {self.cache_gb}")
        if self.timeout_minutes is not None and self.timeout_minutes <= 0:
            raise ValueError(f"timeout_minutes must be positive or null, not {self.timeout_minutes}")
        try:
            torch.device(self.device or "cpu")
        except RuntimeError:
            raise ValueError(f"device must be cpu, cuda or cuda:N, not {self.device!r}") from None


@dataclass(frozen=True)
class Settings:
    """One cell: what to compute, and how. On the command line and in files its settings are one flat list."""

    run: Run
    execution: Execution

    def replace(self, **changes: Any) -> "Settings":
        """These settings but for some, by their names on the command line."""
        of_run = {name: value for name, value in changes.items() if name in RUN_SETTINGS}
        of_execution = {name: value for name, value in changes.items() if name not in RUN_SETTINGS}
        return Settings(dataclasses.replace(self.run, **of_run), dataclasses.replace(self.execution, **of_execution))

    def reference(self) -> "Settings":
        """The unquantized run that this one is compared with."""
        return self.replace(method=Method("fp16", None), force=False)

    def identity(self) -> dict[str, Any]:
        """Everything that can change a number, and nothing else. Its hash names the run."""
        return self.run.identity(self.execution.data_root)

    def resolved(self) -> dict[str, Any]:
        """Every setting, for the record; the model's folder by what is in it."""
        flat = {name: plain(getattr(half, name)) for half in (self.run, self.execution) for name in _names(half)}
        return {"class": "Settings"} | {name: flat[name] for name in ALL_SETTINGS} | self.identity()

    @cached_property
    def digest(self) -> str:
        """Ten hexadecimal digits that name everything that can change a number."""
        return digest_of(self.identity())

    @property
    def series(self) -> str:
        """The same but for the seed: runs of one series are repetitions of each other."""
        return digest_of({key: value for key, value in self.identity().items() if key != "seed"})

    @property
    def run_name(self) -> str:
        """Method, bits and digest."""
        bits = f"-{self.run.bits}b" if self.run.quantizes else ""
        return f"{self.run.method.name}{bits}-{self.digest}"

    @property
    def study_folder(self) -> Path:
        """Where the runs of the study are."""
        return Path(self.execution.results) / self.execution.study

    @property
    def folder(self) -> Path:
        """Where the run's files are."""
        return self.study_folder / self.run.model.name / self.run_name

    @classmethod
    def from_config(cls, cfg: DictConfig) -> "Settings":
        """Check a composed configuration.

        Raises:
            InputError: a key is unknown or missing, or a value has the wrong type or is out of range.
        """
        ours = OmegaConf.masked_copy(
            cfg, [str(key) for key in cfg if key != "hydra"]
        )  # Hydra's part asks for our run name
        try:
            tree = typing.cast(dict[str, Any], OmegaConf.to_container(ours, resolve=True))
        except InterpolationToMissingValueError as error:
            missing = str(error).splitlines()[0].rpartition(" ")[2]
            raise InputError(f"{missing} is missing: set {missing}=...") from None
        except OmegaConfBaseException as error:
            raise InputError(str(error).splitlines()[0]) from None
        for key in tree:
            if key not in ALL_SETTINGS:
                raise unknown_setting("", key, list(ALL_SETTINGS))
        tree |= {"method": _method(tree.get("method"))}
        run = {key: entry for key, entry in tree.items() if key in RUN_SETTINGS}
        execution = {key: entry for key, entry in tree.items() if key not in RUN_SETTINGS}
        return cls(build(Run, run, ""), build(Execution, execution, ""))


def _method(node: Any) -> Method:
    method = dict(node or {})
    name, target = method.pop("name", None), method.get("_target_")
    if not isinstance(name, str):
        raise InputError("method.name is missing: the file of a method in conf/ must give its name")
    if target is None and (unknown := sorted(set(method) - {"_target_"})):
        raise unknown_setting("method", unknown[0], [])
    return Method(name, build(LayerSolver, method, "method") if target is not None else None)


def _names(settings: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(settings)]


RUN_SETTINGS = frozenset(_names(Run))


def _all_settings() -> tuple[str, ...]:
    """The names of all settings in the order of config.yaml, which is that of published results."""
    names = [*_names(Run), *_names(Execution)]
    published = ("method", "model", "calibration", "evaluation", "tracker", *GRID, "act_order", "seed")
    last = ("warnings", "force", "retry_failed", "timeout_minutes", "dry_run")
    rest = [name for name in names if name not in published + last]
    return (*published, *rest, *last)


ALL_SETTINGS = _all_settings()
