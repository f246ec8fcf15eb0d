"""How and where a cell is computed: no field can change a number, so none is part of the digest."""

from dataclasses import dataclass
from importlib.util import find_spec

import torch

from runners.names import check_name

KEEP = {True: "always", False: "never"}  # what keep_checkpoint says in fewer words


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
            raise ValueError('name=trackio needs a package that is not installed: pip install -e ".[dashboard]"')
        if self.mode not in (None, "online", "offline"):
            raise ValueError(f"mode must be online, offline or null, not {self.mode}")
        if len(self.project) > 128 or set(self.project) & set("/\\#?%:"):
            raise ValueError(f"project must have at most 128 characters and none of / \\ # ? % :, not {self.project!r}")


@dataclass(frozen=True)
class Execution:
    """How and where a cell is computed. No field is part of the identity, because none can change a number."""

    tracker: Tracker
    study: str
    results: str
    data_root: str | None
    device: str | None
    batch_size: int | None
    cache: str | None
    cache_gb: float
    keep_checkpoint: str | bool
    force: bool
    retry_failed: bool
    timeout_minutes: float | None
    dry_run: bool
    checkpoints_gb: float = 20.0  # younger than published results, whose settings must still make an Execution

    def __post_init__(self) -> None:
        check_name("study", self.study)
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")
        for name in ("cache_gb", "checkpoints_gb"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if self.keeps not in ("auto", "always", "never"):
            raise ValueError(f"keep_checkpoint must be auto, always or never, not {self.keep_checkpoint}")
        if self.timeout_minutes is not None and self.timeout_minutes <= 0:
            raise ValueError(f"timeout_minutes must be positive or null, not {self.timeout_minutes}")
        try:
            torch.device(self.device or "cpu")
        except RuntimeError:
            raise ValueError(f"device must be cpu, cuda or cuda:N, not {self.device!r}") from None

    @property
    def keeps(self) -> str:
        """What becomes of the codes of a run that is done: auto, always or never."""
        return KEEP[self.keep_checkpoint] if isinstance(self.keep_checkpoint, bool) else self.keep_checkpoint
