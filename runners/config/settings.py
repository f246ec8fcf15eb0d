"""All that one run needs to know, and what it is called: its identity, digest, name and folder."""

import dataclasses
import json
import typing
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from quantease.act_order import ActOrder
from quantease.grid import GridSpec
from quantease.layer import LayerSolver
from runners.config.build import build, plain, unknown_setting
from runners.data.calibration import Calibration
from runners.data.task_rows import task_version
from runners.data.windows import Evaluation
from runners.errors import InputError
from runners.models.checkpoint import Model
from runners.storage.fingerprint import checkpoint_fingerprint


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


@dataclass(frozen=True)
class Settings:
    """All that one run needs to know."""

    method: Method
    model: Model
    calibration: Calibration
    evaluation: Evaluation
    tracker: Tracker
    bits: int
    group_size: int | None
    symmetric: bool
    scale_bits: int
    grid_range: str
    act_order: bool
    seed: int
    study: str
    results: str
    data_root: str | None
    device: str | None
    batch_size: int | None
    cache: str | None
    cache_gb: float
    keep_checkpoint: bool
    warnings: str
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
        if self.warnings not in ("record", "error"):
            raise ValueError(f"warnings must be record or error, not {self.warnings!r}")
        try:
            torch.device(self.device or "cpu")
        except RuntimeError:
            raise ValueError(f"device must be cpu, cuda or cuda:N, not {self.device!r}") from None
        _ = self.grid  # refuses what GridSpec refuses

    @property
    def grid(self) -> GridSpec:
        return GridSpec(self.bits, self.group_size, self.symmetric, self.scale_bits, self.grid_range)

    @property
    def quantizes(self) -> bool:
        """False for the unquantized reference, which no setting of the grid or the calibration touches."""
        return self.method.solver is not None

    @property
    def solver(self) -> LayerSolver:
        """The method's solver, in act-order if that is asked for."""
        if self.method.solver is None:
            raise ValueError(f"{self.method.name} does not quantize")
        return ActOrder(self.method.solver) if self.act_order else self.method.solver

    def reference(self) -> "Settings":
        """The unquantized run that this one is compared with."""
        return dataclasses.replace(self, method=Method("fp16", None), force=False)

    def identity(self) -> dict[str, Any]:
        """Everything that can change a number, and nothing else. Its hash names the run."""
        identity: dict[str, Any] = {"method": self.method, "model": self.model, "evaluation": self.evaluation}
        if self.quantizes:
            shared = {key: getattr(self, key) for key in ("calibration", "act_order", "seed")}
            identity |= shared | {"grid": self.grid}
            if self.warnings == "error":
                # It changes no number, but a run that has only recorded them must not answer for it.
                identity["warnings"] = self.warnings
        identity = plain(identity)
        if not self.evaluation.tasks:
            del identity["evaluation"]["tasks"], identity["evaluation"]["limit"]
        if not self.evaluation.skip_missing:
            del identity["evaluation"]["skip_missing"]
        if self.model.folder is not None:
            identity["model"]["path"] = checkpoint_fingerprint(self.model.folder)  # what is in it, not where it lies
        texts = {name: text.dataset for name, text in self.evaluation.texts.items()}
        if self.quantizes:
            texts["calibration"] = self.calibration.dataset
        identity["data"] = {name: dataset.version(self.data_root) for name, dataset in texts.items()}
        tasks = {f"zero_shot/{name}": task_version(name, self.data_root) for name in self.evaluation.tasks}
        identity["data"] |= tasks
        return identity

    def resolved(self) -> dict[str, Any]:
        """Every setting, for the record; the model's folder by what is in it."""
        return plain(self) | self.identity()

    @cached_property
    def digest(self) -> str:
        """Ten hexadecimal digits that name everything that can change a number."""
        return _digest(self.identity())

    @property
    def series(self) -> str:
        """The same but for the seed: runs of one series are repetitions of each other."""
        return _digest({key: value for key, value in self.identity().items() if key != "seed"})

    @property
    def run_name(self) -> str:
        bits = f"-{self.bits}b" if self.quantizes else ""
        return f"{self.method.name}{bits}-{self.digest}"

    @property
    def study_folder(self) -> Path:
        return Path(self.results) / self.study

    @property
    def folder(self) -> Path:
        return self.study_folder / self.model.name / self.run_name

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
        method = dict(tree.get("method") or {})
        name, target = method.pop("name", None), method.get("_target_")
        if not isinstance(name, str):
            raise InputError("method.name is missing: the file of a method in conf/ must give its name")
        if target is None and (unknown := sorted(set(method) - {"_target_"})):
            raise unknown_setting("method", unknown[0], [])
        solver = build(LayerSolver, method, "method") if target is not None else None
        return build(cls, tree | {"method": Method(name, solver)}, "")


def _digest(identity: dict[str, Any]) -> str:
    return sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]
