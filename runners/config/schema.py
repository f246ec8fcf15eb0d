"""The groups of the configuration: what a file of each folder of `conf/` says."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from quantease.layer import LayerSolver
from runners.data.datasets import Dataset

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Method:
    """One file of `conf/method/`: a name and the solver it builds, None for the unquantized reference."""

    name: str
    solver: LayerSolver | None


@dataclass(frozen=True)
class Model:
    """One file of `conf/model/`.

    Attributes:
        path: a folder, or a repository of the model hub.
        revision: branch, tag or commit of the repository; None: its main branch.
        dtype: what the weights are loaded as; None: what the checkpoint holds.
        sequence_length: tokens of a calibration sequence and of an evaluation window; None: the model's, at most 2,048.
    """

    name: str
    path: str
    revision: str | None = None
    dtype: str | None = None
    sequence_length: int | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)} or null, not {self.dtype}")
        if self.sequence_length is not None and self.sequence_length < 2:
            raise ValueError(f"sequence_length must be at least 2, not {self.sequence_length}")

    @property
    def folder(self) -> Path | None:
        """The local folder that `path` names, if it names one."""
        path = Path(self.path).expanduser()
        return path if path.is_dir() or self.path.startswith(("/", "./", "../", "~")) else None


@dataclass(frozen=True)
class Calibration:
    """One file of `conf/calibration/`.

    Attributes:
        sampling: `documents` draws a random window within a random document that is long enough (GPTQ's rule for C4),
            `joined` a random window of all documents joined by `join`.
        num_sequences: how many sequences to draw.
        true_sequential: the layers of a block that run later are solved on what the earlier, already quantized ones
            feed them; otherwise all layers of a block see the block as it was (the published protocol).
        inputs: `quantized`: a block sees what the quantized blocks before it feed it (the published protocol);
            `full_precision`: what the unquantized ones do, which is the same for all methods and computed once for all.
        held_out: how many more sequences to draw, on which the layers' errors are measured but nothing is calibrated.
    """

    name: str
    dataset: Dataset
    sampling: str
    join: str = "\n\n"
    num_sequences: int = 128
    true_sequential: bool = False
    inputs: str = "quantized"
    held_out: int = 16

    def __post_init__(self) -> None:
        if self.inputs not in ("quantized", "full_precision"):
            raise ValueError(f"inputs must be quantized or full_precision, not {self.inputs}")
        if self.inputs == "full_precision" and self.true_sequential:
            raise ValueError("true_sequential=true needs inputs=quantized: later layers see the earlier ones quantized")
        if self.held_out < 0:
            raise ValueError(f"held_out must not be negative, not {self.held_out}")
        if self.sampling not in ("documents", "joined"):
            raise ValueError(f"sampling must be documents or joined, not {self.sampling}")
        if self.num_sequences < 1:
            raise ValueError(f"num_sequences must be at least 1, not {self.num_sequences}")


@dataclass(frozen=True)
class Text:
    """A text to measure perplexity on: which documents, joined by what, and how many windows of it.

    Attributes:
        protocol: the name under which the field knows this choice; it is stored with every number.
        max_documents: take only the first so many documents; None: all.
        max_windows: take only the first so many windows; None: all.
    """

    protocol: str
    dataset: Dataset
    join: str = "\n\n"
    max_documents: int | None = None
    max_windows: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """One file of `conf/evaluation/`.

    Attributes:
        texts: what perplexity is measured on.
        tasks: what zero-shot accuracy is measured on: names of lm-eval, or the bundled task.
        limit: take only the first so many questions of a task; None: all.
        skip_missing: skip a text whose data set cannot be had, and say so in the results, where the run would fail. (A
            task that is not to be had never stops a run.)
        agreement: compare the next-token distribution with the unquantized model's on every text.
    """

    texts: dict[str, Text]
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    skip_missing: bool = False
    agreement: bool = True

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1 or null, not {self.limit}")
        if repeated := [name for name in self.tasks if self.tasks.count(name) > 1]:
            raise ValueError(f"tasks names {repeated[0]} twice")


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
