"""The settings of a cell and the names derived from them: identity, digest, run name and folder."""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from runners.config.execution import Execution
from runners.config.run import GRID, Method, Run
from runners.identity import digest_of, plain
from runners.results.metrics import REFERENCE


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
        model = self.run.original or self.run.model
        return self.replace(method=Method(REFERENCE, None), model=model, reference=None, force=False)

    @cached_property
    def _identity(self) -> dict[str, Any]:
        """Asked for once: it has the hashes of the data sets, whose files may be gone when the run ends."""
        return self.run.identity(self.execution.data_root)

    def identity(self) -> dict[str, Any]:
        """Everything that can change a number, and nothing else. The run's folder has its hash in its name."""
        return dict(self._identity)

    def resolved(self) -> dict[str, Any]:
        """Every setting, for `config.yaml`; the model's folder is replaced by the fingerprint of its files."""
        flat = {name: plain(getattr(half, name)) for half in (self.run, self.execution) for name in _names(half)}
        return {"class": "Settings"} | {name: flat[name] for name in ALL_SETTINGS} | self.identity()

    @cached_property
    def digest(self) -> str:
        """Ten hexadecimal digits of the hash of everything that can change a number."""
        return digest_of(self.identity())

    def quantization_identity(self) -> dict[str, Any]:
        """The part of the identity that determines the codes."""
        return self._quantization_identity

    @cached_property
    def _quantization_identity(self) -> dict[str, Any]:
        return self.run.quantization_identity(self.execution.data_root)

    @cached_property
    def quantization(self) -> str:
        """The digest of what determines the codes: runs that share it are evaluations of one quantization."""
        return digest_of(self.quantization_identity())

    @property
    def series(self) -> str:
        """The digest without the seed: runs of one series are repetitions of each other."""
        return digest_of({key: value for key, value in self.identity().items() if key != "seed"})

    @property
    def run_name(self) -> str:
        """Method, bits and digest; of a run whose layers are not treated alike the bits of most, and `mixed`."""
        bits = f"-{self.run.bits}b{'-mixed' * self.run.is_mixed}" if self.run.quantizes else ""
        return f"{self.run.method.name}{bits}-{self.digest}"

    @property
    def study_folder(self) -> Path:
        """The folder of the study's runs."""
        return Path(self.execution.results) / self.execution.study

    @property
    def folder(self) -> Path:
        """The folder of the run's files."""
        return self.study_folder / self.run.model.name / self.run_name


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
