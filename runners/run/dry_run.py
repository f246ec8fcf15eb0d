"""What a dry run says of the cells that are still to be run: time, memory and disk, each only where it has a basis."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from runners.config.settings import Settings
from runners.console import duration
from runners.errors import InputError
from runners.models.blocks import decoder_blocks
from runners.models.checkpoint import Model, sequence_length, skeleton_here
from runners.quantization.finished_blocks import FOLDER
from runners.results.metrics import OUTLIER_RATIO
from runners.results.run_folder import RunFolder
from runners.results.tables import BASIS
from runners.run.disk import FULL_PRECISION, codes_bytes, sequence_bytes, statistics_bytes
from runners.run.environment import device_name, processor
from runners.run.estimate import Estimate, Runs, closest, estimate, likeness, windows_of
from runners.run.measured import Machine, Work, measured_runs, model_of, work_of
from runners.run.preflight import open_device


@dataclass(frozen=True)
class Forecast:
    """What is known of one run before it starts.

    Attributes:
        expected: its time and memory; None: it runs on another machine.
        codes: bytes of its finished blocks; None: not known.
        codes_at_least: outliers, whose number is not known, come on top of them.
        shared: bytes that it adds to the cache, by what they are: other runs on the model add the same.
    """

    expected: Estimate | None
    codes: int | None = None
    codes_at_least: bool = False
    shared: dict[str, int] = field(default_factory=dict)

    @property
    def words(self) -> dict[str, str]:
        """Time, memory and disk as the columns of a table, and where they come from."""
        words = {} if self.codes is None else {"disk": "> " * self.codes_at_least + size_words(self.codes)}
        if (expected := self.expected) is None:
            return words
        words[BASIS] = expected.basis
        if expected.is_known:
            words["time"] = "> " * bool(expected.unknown) + duration(expected.seconds)
        if expected.memory_gb is not None:
            words["memory"] = "> " * bool(expected.unknown) + f"{expected.memory_gb:.2f} GB"
        return words


class Forecaster:
    """Estimates runs; what several of them share is looked up once.

    Args:
        is_here: the runs are to be made on this machine.
    """

    def __init__(self, is_here: bool) -> None:
        self._is_here = is_here
        self._threads = torch.get_num_threads()
        self._machines: dict[str | None, Machine | None] = {}
        self._runs: dict[Any, Runs] = {}
        self._skeletons: dict[Model, Any] = {}

    def __call__(self, settings: Settings) -> Forecast:
        """The forecast of one run."""
        resolved = settings.resolved()
        work, runs, skeleton = work_of(resolved), self._measured(settings, resolved), self._skeleton(settings.run.model)
        per_sequence = 0
        if skeleton is not None:
            length = sequence_length(settings.run.model, skeleton)
            per_sequence = sequence_bytes(skeleton, settings.run.model, length)
        share = _share_left(settings, skeleton)
        expected = None if runs is None else estimate(work, runs, self._threads, share, per_sequence)
        if skeleton is None:
            return Forecast(expected)
        codes, is_least = self._codes(settings, skeleton, work, runs or ())
        return Forecast(expected, codes, is_least, _shared(settings, skeleton, work, runs or (), per_sequence))

    def _codes(self, settings: Settings, skeleton: Any, work: Work, runs: Runs) -> tuple[int | None, bool]:
        if not settings.run.quantizes:
            return None, False
        ratio = getattr(settings.run.method.solver, "outlier_ratio", 0.0)
        if ratio is None:  # the method finds out by itself: as many as it has found before
            basis = closest([run for run in runs if run.work.method == work.method], likeness(work, self._threads))
            ratio = median(run.metrics[OUTLIER_RATIO] for run in basis) if basis else None
        return codes_bytes(skeleton, settings, ratio or 0.0), ratio is None

    def _measured(self, settings: Settings, resolved: Mapping[str, Any]) -> Runs | None:
        machine = self._machine(settings.execution.device)
        if machine is None:
            return None
        results, model = Path(settings.execution.results), model_of(resolved)
        if (results, model, machine) not in self._runs:
            self._runs[results, model, machine] = measured_runs(results, model, machine)
        return self._runs[results, model, machine]

    def _machine(self, device: str | None) -> Machine | None:
        if self._is_here and device not in self._machines:
            try:
                name = device_name(open_device(device))
                self._machines[device] = Machine(name, processor(), self._threads)
            except InputError:  # a dry run lists the cells of a machine that has it
                self._machines[device] = None
        return self._machines.get(device)

    def _skeleton(self, model: Model) -> Any:
        if model not in self._skeletons:
            try:
                self._skeletons[model] = skeleton_here(model)
            except InputError:  # the run itself says what is wrong
                self._skeletons[model] = None
        return self._skeletons[model]


def forecasts(cells: Sequence[Settings], is_here: bool) -> tuple[dict[Path, dict[str, str]], list[str]]:
    """The words on every cell that is still to be run, by its folder, and the lines on all of them together.

    Args:
        cells: `retry_failed` and `force` say which of them a command would run.
        is_here: they are to be run on this machine.
    """
    forecast = Forecaster(is_here)
    unique = {cell.folder: cell for cell in cells if _is_to_run(cell)}
    found = {folder: forecast(cell) for folder, cell in unique.items()}
    needed = [cell.reference() for cell in unique.values() if cell.run.quantizes]
    references = {run.folder: forecast(run) for run in needed if run.folder not in unique and _is_to_run(run)}
    if not found:
        return {}, []
    lines = [_time_line(list(found.values()), list(references.values()), is_here)]
    lines += _disk_lines(list(unique.values()), [*found.values(), *references.values()])
    return {folder: one.words for folder, one in found.items()}, lines


def size_words(size: float) -> str:
    """`1.9 MB`, in units of 10^6 or 10^9 bytes."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _is_to_run(run: Settings) -> bool:
    folder = RunFolder(run.folder)
    return folder.is_to_run(run.execution.force, run.execution.retry_failed) and not folder.is_running()


def _share_left(settings: Settings, skeleton: Any) -> float:
    """How much of the quantization an interrupted run still has before it."""
    blocks = len(list(settings.folder.glob(f"{FOLDER}/block-*.json")))
    if not blocks or skeleton is None or settings.execution.force:
        return 1.0
    return max(0.0, 1 - blocks / len(decoder_blocks(skeleton)))


def _shared(settings: Settings, skeleton: Any, work: Work, runs: Runs, per_sequence: int) -> dict[str, int]:
    """What a run puts into the cache, unless it is there already."""
    if settings.execution.cache is None:
        return {}
    where, found = f"{settings.execution.cache} {settings.run.model_path}", {}
    if work.agreement:
        for name, text in work.texts.items():
            found[f"{where} {text}"] = per_sequence * (windows_of(name, work, runs) or 0)
    if work.mode and work.mode[0] == FULL_PRECISION:
        calibration = settings.run.calibration
        held_out = calibration is not None and calibration.held_out > 0
        found[f"{where} {calibration} {settings.run.seed}"] = statistics_bytes(skeleton, held_out)
    return found


def _time_line(cells: Sequence[Forecast], references: Sequence[Forecast], is_here: bool) -> str:
    expected = [one.expected for one in [*cells, *references] if one.expected is not None]
    if not expected:
        return "time   " + (
            "not known: the device cannot be used here" if is_here else "not known: another machine runs them"
        )
    known = [one for one in expected if one.is_known]
    if not known:
        return f"time   {expected[0].basis}"
    whose = f"{len(cells)} cell{'s' * (len(cells) > 1)}" + " and the unquantized model" * bool(references)
    if is_partial := any(one.unknown for one in expected):
        whose += ", of which not all was measured here yet"
    seconds = duration(sum(one.seconds for one in known))
    return f"time   {'over' if is_partial else 'about'} {seconds} for {whose}; one after another, besides loading and checks"


def _disk_lines(cells: Sequence[Settings], found: Sequence[Forecast]) -> list[str]:
    names = sorted(
        {
            cell.run.model.name
            for cell, one in zip(cells, found, strict=False)
            if one.codes is None and cell.run.quantizes
        }
    )
    codes = sum(one.codes or 0 for one in found)
    shared = sum({key: size for one in found for key, size in one.shared.items()}.values())
    lines = (
        [f"disk   not known for {', '.join(names)}: its files are not here, and a dry run downloads nothing"]
        if names
        else []
    )
    words = []
    if codes:
        over = "over " * any(one.codes_at_least for one in found)
        kept = all(cell.execution.keep_checkpoint not in (False, "never") for cell in cells if cell.run.quantizes)
        words.append(f"{over}{size_words(codes)} of codes, " + ("kept" if kept else "each cell's deleted at its end"))
    if shared:
        limit = min(cell.execution.cache_gb for cell in cells) * 1e9
        words.append(f"at most {size_words(min(shared, limit))} in {cells[0].execution.cache}")
    return lines + ([f"disk   {'; '.join(words)}"] if words else [])
