"""What can be said of a cell's inputs without reading weights or texts: whether they are there, and fit the grid.

It is asked of every cell of a command before the first folder is made. What only reading shows (a damaged line, a text that
is too short, weights that are not finite) is found by the run's own preflight, and is a row.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from runners.config.run import Run
from runners.config.settings import Settings
from runners.data.datasets import HubDataset
from runners.errors import InputError
from runners.models.blocks import check_divisibility
from runners.models.checkpoint import Model, model_skeleton


def input_problems(settings: Settings, is_run_here: bool) -> list[str]:
    """Why a cell cannot work, in sentences; none: nothing speaks against it.

    Args:
        is_run_here: False where another machine runs the cell, which may reach a hub, or have a cache, that this one does
            not. Files are looked for in either case: the run's digest is computed from them here.
    """
    return list(dict.fromkeys(_problems(settings.run, settings.execution.data_root, is_run_here)))


def _problems(run: Run, data_root: str | None, is_run_here: bool) -> Iterator[str]:
    if is_run_here or (run.model.gguf is None and run.model.folder is not None):
        skeleton, problem = _opened(run.model)
        if problem is None and run.quantizes:
            problem = _division_problem(skeleton, run)
        if problem is not None:
            yield problem
    for dataset in _needed_datasets(run):
        if (is_run_here or data_root is not None) and (problem := _data_problem(dataset, data_root)):
            yield problem


def _needed_datasets(run: Run) -> list[HubDataset]:
    """The data sets that the run cannot do without. A zero-shot task that is missing is skipped."""
    texts = [] if run.evaluation.skip_missing else [text.dataset for text in run.evaluation.texts.values()]
    needed = [*texts, *([run.calibration.dataset] if run.quantizes and run.calibration else [])]
    return [dataset for dataset in needed if isinstance(dataset, HubDataset)]


def _division_problem(skeleton: Any, run: Run) -> str | None:
    try:
        check_divisibility(skeleton, run.grid)
    except InputError as error:
        return str(error)
    return None


# The cells of a sweep share their inputs, and a problem takes as long to find as its absence: both are kept.


@lru_cache(maxsize=4)
def _opened(model: Model) -> tuple[Any, str | None]:
    """The model without its weights, or why it cannot be had."""
    try:
        return model_skeleton(model), None
    except InputError as error:
        return None, str(error)


@lru_cache(maxsize=64)
def _data_problem(dataset: HubDataset, data_root: str | None) -> str | None:
    try:
        dataset.find(data_root)
    except InputError as error:
        return str(error)
    return None
