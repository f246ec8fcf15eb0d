"""What a cell computes: every field can change a number, so every field is part of the digest."""

from dataclasses import dataclass, field, replace
from typing import Any

from quantease.act_order import ActOrder
from quantease.grid import GridSpec
from quantease.grids.levels import LevelFormat
from quantease.layer import LayerSolver
from quantease.transform import Transform, Transformed
from runners.config.layer_rules import LayerRule, spec_of, spec_words
from runners.data.calibration import Calibration
from runners.data.task_rows import task_version
from runners.data.windows import Evaluation
from runners.fetch.packages import present
from runners.identity import counts_if, identifying_fields, identity_of
from runners.models.checkpoint import Model
from runners.names import check_name
from runners.results.metrics import FALLBACK_RTN, FALLBACKS, STORED
from runners.storage.fingerprint import checkpoint_fingerprint, fingerprint

CALIBRATION_DATA = "calibration"  # in the identity's versions of data sets, beside the names of the texts
NOT_OF_CODES = ("evaluation", "warnings", "reference")  # settings that change no code
GROUPS = "groups"  # the act_order that sorts inside each grid group
GRID = ("bits", "group_size", "symmetric", "scale_bits", "grid_range")  # the settings of GridSpec, in its order


@dataclass(frozen=True)
class Method:
    """One file of `conf/method/`: a name and the solver it builds, None for the unquantized reference."""

    name: str
    solver: LayerSolver | None


def _quantizes(run: "Run") -> bool:
    return run.method.solver is not None


@dataclass(frozen=True)
class Run:
    """What is computed. Every field is part of the identity, unless it has no effect, as the grid and calibration on fp16.

    The order of the fields is that of the labels by which the cells of a sweep are told apart.
    """

    method: Method
    model: Model
    evaluation: Evaluation
    calibration: Calibration | None = field(metadata=counts_if(_quantizes))  # None: calibration=none
    act_order: bool | str = field(metadata=counts_if(_quantizes))
    seed: int = field(metadata=counts_if(_quantizes))
    bits: int = field(metadata=counts_if(_quantizes))
    group_size: int | None = field(metadata=counts_if(_quantizes))
    symmetric: bool = field(metadata=counts_if(_quantizes))
    scale_bits: int = field(metadata=counts_if(_quantizes))
    grid_range: str = field(metadata=counts_if(_quantizes))
    # It changes no number. But a run that only recorded its warnings must not be taken for one that stops at them.
    warnings: str = field(metadata=counts_if(lambda run: _quantizes(run) and run.warnings != "record"))
    # Older results left such layers as they were. None that is published had any, so the default is not in their digests.
    fallback: str = field(default=FALLBACK_RTN, metadata=counts_if(lambda run: run.takes_other_fallback))
    # With method=stored: folder, GGUF file or name on the hub of the original that it is compared with.
    reference: str | None = field(default=None, metadata=counts_if(lambda run: run.reference is not None))
    # Levels to look up in place of whole codes (conf/grid/); None: whole codes, as all grids once had.
    grid_format: LevelFormat | None = field(
        default=None, metadata=counts_if(lambda run: _quantizes(run) and run.grid_format is not None)
    )
    # What is done to every layer before the method, and undone in its answer (conf/transform/).
    transform: Transform | None = field(
        default=None, metadata=counts_if(lambda run: _quantizes(run) and run.transform is not None)
    )
    # Layers of unlike treatment; (): all layers are treated alike, as all once were.
    layers: tuple[LayerRule, ...] = field(default=(), metadata=counts_if(lambda run: run.is_mixed))

    def __post_init__(self) -> None:
        if self.act_order not in (False, True, GROUPS):
            raise ValueError(f"act_order must be false, true or {GROUPS}, not {self.act_order!r}")
        if self.act_order == GROUPS and self.group_size is None:
            raise ValueError(
                "act_order=groups sorts inside groups, and group_size=null makes none: take act_order=true"
            )
        if self.warnings not in ("record", "error"):
            raise ValueError(f"warnings must be record or error, not {self.warnings!r}")
        if self.fallback not in FALLBACKS:
            raise ValueError(f"fallback must be one of {', '.join(FALLBACKS)}, not {self.fallback!r}")
        if self.reference is not None and not self.is_stored:
            raise ValueError(
                f"reference={self.reference} names the original of a checkpoint that method=stored measures; "
                f"{self.method.name} is compared with the unquantized run of its own model: leave reference out"
            )
        _ = self.grid  # refuses what GridSpec refuses
        for place, rule in enumerate(self.layers):
            try:
                rule.spec(self.grid)
            except ValueError as error:
                raise ValueError(f"layers[{place}], match={rule.match}: {error}") from None
        self._check_inputs()
        check_name("model.name", self.model.name)
        check_name("method.name", self.method.name)
        for name in (
            *self.evaluation.texts,
            *self.evaluation.tasks,
        ):  # tables and keys of metrics.json have these names
            check_name("the name of a text or task in evaluation", name)

    def _check_inputs(self) -> None:
        """Refuse a method that needs inputs where there is no calibration, or other inputs than it measures."""
        if self.needs_cross and self.calibration is not None and self.calibration.inputs != "quantized":
            raise ValueError(
                f"calibration.inputs={self.calibration.inputs} shows nothing of what {self.method.name} corrects for, which "
                "the inputs of a layer have lost in the quantized blocks before it: take calibration.inputs=quantized"
            )
        if self.calibration is not None or not self.quantizes or not self.solver.needs_inputs:
            return
        who = f"{self.method.name} is fitted to the inputs of the layers"
        if not getattr(self.method.solver, "needs_inputs", True):
            who = f"transform={self.transform.name} goes by the inputs of the layers" if self.transform else who
            who = "act_order=true sorts the columns by their inputs" if self.act_order else who
        raise ValueError(f"calibration=none measures no inputs, but {who}: choose a calibration text, or method=rtn")

    @property
    def grid(self) -> GridSpec:
        """The grid that the method solves on."""
        return GridSpec(*(getattr(self, name) for name in GRID), format=self.grid_format)

    def spec_of(self, layer: str) -> GridSpec | None:
        """The grid of a layer, given by its full name (`0.self_attn.q_proj`); None: it keeps its weights."""
        return spec_of(self.layers, self.grid, layer)

    @property
    def is_mixed(self) -> bool:
        """Whether some layers are treated unlike others."""
        return _quantizes(self) and bool(self.layers)

    @property
    def layer_words(self) -> str:
        """How layers that are not alike are treated: `*.fc2 4 bits group 64; 0.* skipped; others 3 bits per-channel`."""
        return "; ".join([*(rule.words(self.grid) for rule in self.layers), f"others {spec_words(self.grid)}"])

    @property
    def quantizes(self) -> bool:
        """False for the unquantized reference, on which the grid and the calibration have no effect."""
        return _quantizes(self)

    @property
    def sorts_within_groups(self) -> bool:
        """Whether act-order leaves the columns of a grid group together."""
        return self.act_order == GROUPS

    @property
    def needs_cross(self) -> bool:
        """Whether the unquantized model walks through the calibration sequences beside the quantized one."""
        return self.quantizes and self.solver.needs_cross

    @property
    def takes_other_fallback(self) -> bool:
        """Whether layers that calibration hardly reaches get another fallback than the default."""
        return self.quantizes and self.calibration is not None and self.fallback != FALLBACK_RTN

    @property
    def is_stored(self) -> bool:
        """Whether the model was quantized elsewhere, and is measured as it is stored."""
        return self.method.name == STORED and self.method.solver is None

    @property
    def is_compared(self) -> bool:
        """Whether there is an unquantized run that this one is compared with."""
        return self.quantizes or self.reference is not None

    @property
    def original(self) -> Model | None:
        """The model that `reference` names: the unquantized one of a checkpoint that was quantized elsewhere."""
        return None if self.reference is None else replace(self.model, path=self.reference, revision=None)

    @property
    def solver(self) -> LayerSolver:
        """The method's solver, wrapped for act-order and behind a transform where the settings ask for it."""
        if self.method.solver is None:
            raise ValueError(f"{self.method.name} does not quantize")
        solver = self.method.solver
        if self.act_order:
            solver = ActOrder(solver, within_groups=self.act_order == GROUPS)
        return solver if self.transform is None else Transformed(self.transform, solver)

    def identity(self, data_root: str | None) -> dict[str, Any]:
        """Everything that can change a number, and nothing else. The run's folder has its hash in its name.

        Args:
            data_root: the folder of the data sets, whose files belong to the identity; None: the hub.
        """
        identity: dict[str, Any] = {}
        for name in identifying_fields(self):
            if name in GRID:  # one entry for all of them: digests of published results were computed so
                grid = identity_of(self.grid)
                identity["grid"] = {key: value for key, value in grid.items() if key != "format"}  # grid_format has it
            elif name == "grid_format":
                identity[name] = self.grid.format and self.grid.format.name
            elif name == "layers":
                identity[name] = [rule.identity(self.grid) for rule in self.layers]
            else:
                identity[name] = identity_of(getattr(self, name))
        identity["model"]["path"] = self.model_path
        if self.original is not None:
            identity["reference"] = _path_of(self.original)
        return identity | {"data": self._data_versions(data_root)}

    def quantization_identity(self, data_root: str | None) -> dict[str, Any]:
        """The part of the identity that determines the codes: all but what is measured on them.

        Args:
            data_root: as for `identity`.
        """
        identity = self.identity(data_root)
        versions = {name: version for name, version in identity["data"].items() if name == CALIBRATION_DATA}
        return {name: entry for name, entry in identity.items() if name not in NOT_OF_CODES} | {"data": versions}

    @property
    def model_path(self) -> str:
        """The fingerprint of the files in the model's folder, wherever it is; of a model of the hub its name there.

        Of a GGUF file that of the file: the folder that it is converted to also depends on the versions of libraries.

        Raises:
            InputError: there is no such GGUF file.
        """
        return _path_of(self.model)

    @property
    def labeled_path(self) -> str:
        """The path by which results know the model: with `reference` that of the original, beside which it then stands."""
        return _path_of(self.original or self.model)

    def calibrated_on(self, data_root: str | None) -> list[str]:
        """The names of the evaluation texts that calibration has drawn from, too: the same data set, or the same file."""
        if not self.quantizes or self.calibration is None:
            return []
        theirs = self.calibration.dataset
        key = identity_of(theirs) | {"version": theirs.version(data_root)}
        texts = self.evaluation.texts.items()
        return [
            name
            for name, text in texts
            if identity_of(text.dataset) | {"version": text.dataset.version(data_root)} == key
        ]

    def _data_versions(self, data_root: str | None) -> dict[str, str]:
        datasets = {name: text.dataset for name, text in self.evaluation.texts.items()}
        if self.quantizes and self.calibration is not None:
            datasets[CALIBRATION_DATA] = self.calibration.dataset
        versions = {name: dataset.version(data_root) for name, dataset in datasets.items()}
        return versions | {f"zero_shot/{name}": task_version(name, data_root) for name in self.evaluation.tasks}


def _path_of(model: Model) -> str:
    """The fingerprint of a model's files; of a model of the hub its name there."""
    if (file := model.gguf) is not None:
        return fingerprint([present(file)])
    return model.path if model.folder is None else checkpoint_fingerprint(model.folder)
