"""How long a run will take, and how much memory, from finished runs of the same model on the same machine.

Each part of a run is taken from the runs that are most like it, and scaled by what is known to be proportional:

    calibration    of runs with the same kind of inputs     * sequences / their sequences
    solver         of runs with the same method             * sweeps / their sweeps
    evaluation     of runs with or without agreement alike  * windows / their windows
    zero-shot      of runs with these tasks                 * questions / their questions

Of several runs that are equally alike the median counts, and of their memory the largest. A part of which nothing alike was
measured has no estimate: it is named instead.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from runners.results import metrics
from runners.run.measured import MeasuredRun, Work

CALIBRATE, SOLVE, PROPAGATE = (metrics.phase_seconds(phase) for phase in ("calibrate", "solve", "propagate"))

NOT_MEASURED = "not measured on this machine yet"
FEW_METHODS = 2  # that are named

Runs = Sequence[MeasuredRun]


@dataclass(frozen=True)
class Part:
    """One part of a run.

    Attributes:
        seconds: None: nothing alike was measured.
        unknown: what was not measured, in words; with `seconds`, a piece of the part that is not in them.
        memory_gb: the peak, in units of 10^9 bytes; None: not known, or there is nothing to do.
        scaled: by what the measured time was scaled, in words; "" where that was not needed.
        basis: the runs that the seconds are from; () where there is nothing to do.
    """

    seconds: float | None = 0.0
    unknown: str = ""
    memory_gb: float | None = None
    scaled: str = ""
    basis: tuple[MeasuredRun, ...] = ()
    is_solver: bool = False


@dataclass(frozen=True)
class Estimate:
    """The estimate of a run: of the parts in `unknown` it has neither time nor memory."""

    seconds: float
    memory_gb: float | None
    unknown: tuple[str, ...]
    basis: str

    @property
    def is_known(self) -> bool:
        """Whether anything of the run was measured."""
        return self.seconds > 0


def estimate(
    work: Work, runs: Runs, threads: int = 0, quantize_share: float = 1.0, sequence_bytes: int = 0
) -> Estimate:
    """The estimate of a run.

    Args:
        runs: of the same model on the same machine.
        threads: that the run will have.
        quantize_share: how much of the quantization is still to be done.
        sequence_bytes: of the activations of a sequence between two blocks, which every further sequence takes.
    """
    walk, solver = _calibration(work, runs, threads), _solver(work, runs, threads, sequence_bytes / 1e9)
    measured = [_evaluation(work, runs, threads, sequence_bytes / 1e9), _zero_shot(work, runs, threads)]
    parts = [walk, solver, *measured]
    seconds = [(part.seconds or 0.0) * (quantize_share if part in (walk, solver) else 1.0) for part in parts]
    peaks = [part.memory_gb for part in parts if part.memory_gb is not None]
    unknown = tuple(dict.fromkeys(part.unknown for part in parts if part.unknown))
    return Estimate(sum(seconds), max(peaks, default=None), unknown, _basis(work, parts))


def closest(runs: Runs, distance: Callable[[MeasuredRun], tuple[int | bool, ...]]) -> tuple[MeasuredRun, ...]:
    """Those of the runs whose distance is the least: its first entry counts most."""
    least = min(map(distance, runs), default=())
    return tuple(run for run in runs if distance(run) == least)


def likeness(work: Work, threads: int) -> Callable[[MeasuredRun], tuple[int | bool, ...]]:
    """How far a run of the same method is from this work: first what changes the time of a solver most."""

    def distance(run: MeasuredRun) -> tuple[int | bool, ...]:
        other = run.work
        differing = [
            key for key in work.solver.keys() | other.solver.keys() if work.solver.get(key) != other.solver.get(key)
        ]
        return (
            len(differing),
            work.grid != other.grid,
            (work.bits, work.group_size) != (other.bits, other.group_size),
            work.sweeps != other.sweeps,
            work.sequences != other.sequences,
            threads != run.threads,
        )

    return distance


def _calibration(work: Work, runs: Runs, threads: int) -> Part:
    """The calibration sequences on their way through the blocks, which is the same for every method."""
    if not work.mode:
        return Part()
    alike = [run for run in runs if run.work.mode == work.mode and CALIBRATE in run.metrics]
    same_method = likeness(work, threads)
    basis = closest(
        alike,
        lambda run: (run.work.sequences != work.sequences, run.work.method != work.method, *same_method(run)),
    )
    if not basis:
        return Part(None, "calibration")
    scaled = f"calibration by {work.sequences} sequences" if basis[0].work.sequences != work.sequences else ""
    seconds = median(
        (run.metrics[CALIBRATE] + run.metrics.get(PROPAGATE, 0.0)) * work.sequences / run.work.sequences
        for run in basis
    )
    return Part(seconds, scaled=scaled, basis=basis)


def _solver(work: Work, runs: Runs, threads: int, sequence_gb: float) -> Part:
    if not work.quantizes:
        return Part()
    alike = [run for run in runs if run.work.method == work.method and SOLVE in run.metrics]
    basis = closest(alike, likeness(work, threads))
    if not basis:
        return Part(None, work.method)
    scaled = f"solver by {work.sweeps} sweeps" if work.sweeps != basis[0].work.sweeps else ""
    seconds = median(run.metrics[SOLVE] * _ratio(work.sweeps, run.work.sweeps) for run in basis)
    memory = _peak(basis, metrics.QUANTIZE_MEMORY, lambda run: sequence_gb * (work.sequences - run.work.sequences))
    return Part(seconds, "", memory, scaled, basis, is_solver=True)


def _evaluation(work: Work, runs: Runs, threads: int, sequence_gb: float) -> Part:
    if not work.texts:
        return Part()
    counts = {name: windows_of(name, work, runs) for name in work.texts}
    unknown = ", ".join(name for name, count in counts.items() if count is None)
    wanted = sum(count or 0 for count in counts.values())
    alike = [
        run
        for run in runs
        if (run.work.quantizes, run.work.agreement) == (work.quantizes, work.agreement)
        and _windows(run) > 0
        and metrics.EVALUATE_SECONDS in run.metrics
    ]
    basis = closest(
        alike,
        lambda run: (run.work.texts != work.texts, run.work.method != work.method, threads != run.threads),
    )
    if not basis or not wanted:
        return Part(None, "evaluation")
    scaled = f"evaluation by {wanted} windows" if _windows(basis[0]) != wanted else ""
    seconds = median(run.metrics[metrics.EVALUATE_SECONDS] * wanted / _windows(run) for run in basis)
    walks = 1 + work.agreement
    memory = _peak(basis, metrics.EVALUATE_MEMORY, lambda run: walks * sequence_gb * (wanted - _windows(run)))
    return Part(seconds, unknown, memory, scaled, basis)


def _zero_shot(work: Work, runs: Runs, threads: int) -> Part:
    if not work.tasks:
        return Part()
    alike = [
        run for run in runs if metrics.ZERO_SHOT_SECONDS in run.metrics and _questions(work, run) and _asked(run) > 0
    ]
    basis = closest(
        alike, lambda run: (run.work.tasks != work.tasks, run.work.limit != work.limit, threads != run.threads)
    )
    if not basis:
        return Part(None, "zero-shot tasks")
    wanted = _questions(work, basis[0]) or 0
    scaled = f"zero-shot by {wanted} questions" if wanted != _asked(basis[0]) else ""
    seconds = median(run.metrics[metrics.ZERO_SHOT_SECONDS] * wanted / _asked(run) for run in basis)
    return Part(seconds, "", _peak(basis, metrics.ZERO_SHOT_MEMORY), scaled, basis)


def windows_of(text: str, work: Work, runs: Runs) -> int | None:
    """How many windows a text of this work has, as a run has counted them; else at most so many; None: not known."""
    counted = [
        run.metrics[metrics.windows(text)]
        for run in runs
        if run.work.texts.get(text) == work.texts[text] and metrics.windows(text) in run.metrics
    ]
    return counted[0] if counted else work.texts[text].get("max_windows")


def _windows(run: MeasuredRun) -> int:
    return sum(run.metrics.get(metrics.windows(text), 0) for text in run.work.texts)


def _questions(work: Work, run: MeasuredRun) -> int | None:
    """How many questions the tasks of this work have, as far as a run that was asked them tells; None: it does not."""
    total = 0
    for task in work.tasks:
        asked = run.metrics.get(metrics.zero_shot(task, metrics.MEASURED_HOW[0]))
        if asked is None:
            return None
        has_more = run.work.limit is not None and asked >= run.work.limit
        if has_more and work.limit is None:
            return None
        total += asked if work.limit is None else work.limit if has_more else min(work.limit, asked)
    return total


def _asked(run: MeasuredRun) -> int:
    return sum(run.metrics.get(metrics.zero_shot(task, metrics.MEASURED_HOW[0]), 0) for task in run.work.tasks)


def _ratio(mine: int, theirs: int) -> float:
    return mine / theirs if mine and theirs else 1.0


def _peak(runs: Runs, key: str, more: Callable[[MeasuredRun], float] = lambda _: 0.0) -> float | None:
    """The largest peak of the runs, with what this work takes more than each: fewer sequences do not lower it surely."""
    return max((run.metrics[key] + max(0.0, more(run)) for run in runs if key in run.metrics), default=None)


def _basis(work: Work, parts: Sequence[Part]) -> str:
    """Where an estimate comes from: `from 3 runs of rtn at 4 bits, solver by 10 sweeps`, and what was not measured."""
    known = [part for part in parts if part.basis]
    if not known:
        return NOT_MEASURED
    unknown = ", ".join(dict.fromkeys(part.unknown for part in parts if part.unknown))
    main = next((part for part in known if part.is_solver), known[-1])
    words = [f"from {_runs_words(work, main.basis)}", *(part.scaled for part in known if part.scaled)]
    return "; ".join([*([f"{unknown} {NOT_MEASURED}"] if unknown else []), ", ".join(words)])


def _runs_words(work: Work, runs: Runs) -> str:
    """`3 runs of rtn at 4 bits`: what they are, unless it is what this work is."""
    methods = sorted({run.work.method for run in runs})
    of = f" of {', '.join(methods)}" if len(methods) <= FEW_METHODS else f" of {len(methods)} methods"
    bits = sorted({run.work.bits for run in runs if run.work.bits is not None})
    at = f" at {', '.join(map(str, bits))} bits" if bits and bits != [work.bits] else ""
    return f"{len(runs)} run{'s' * (len(runs) > 1)}{of}{at}"
