"""What can be said of a cell's inputs without reading weights or texts: whether they are there, and fit the grid.

It is asked of every cell of a command before the first folder is made. What only reading shows (a damaged line, a text that
is too short, weights that are not finite) is found by the run's own preflight, and is a row.
"""

from functools import lru_cache
from typing import Any

from runners.config.run import Run
from runners.config.settings import Settings
from runners.data.datasets import HubDataset
from runners.errors import InputError
from runners.models.blocks import check_divisibility
from runners.models.checkpoint import Model, model_skeleton


def input_problem(settings: Settings, is_run_here: bool) -> str | None:
    """Why a cell cannot work, in a sentence; None: nothing speaks against it.

    Args:
        is_run_here: False where another machine runs the cell, which may reach a hub, or have a cache, that this one does
            not. Files are looked for in either case: the run's digest is computed from them here.
    """
    run = settings.run
    try:
        if is_run_here or (run.model.gguf is None and run.model.folder is not None):
            check_divisibility(_skeleton(run.model), run.grid) if run.quantizes else _skeleton(run.model)
        _find_texts(run, settings.execution.data_root, is_run_here)
    except InputError as error:
        return str(error)
    return None


def _find_texts(run: Run, data_root: str | None, is_run_here: bool) -> None:
    """Look for every data set that the run cannot do without. A zero-shot task that is missing is skipped.

    Raises:
        InputError: one is missing.
    """
    texts = [] if run.evaluation.skip_missing else [text.dataset for text in run.evaluation.texts.values()]
    for dataset in [*texts, *([run.calibration.dataset] if run.quantizes else [])]:
        if isinstance(dataset, HubDataset) and (is_run_here or data_root is not None):
            _find(dataset, data_root)


def _skeleton(model: Model) -> Any:
    return _answer(_opened(model))


def _find(dataset: HubDataset, data_root: str | None) -> None:
    _answer(_found(dataset, data_root))


def _answer(answer: Any) -> Any:
    if isinstance(answer, InputError):
        raise answer
    return answer


# The cells of a sweep share their inputs, and a problem with them is as slow to find as its absence: both are kept.


@lru_cache(maxsize=4)
def _opened(model: Model) -> Any:
    try:
        return model_skeleton(model)
    except InputError as error:
        return error


@lru_cache(maxsize=64)
def _found(dataset: HubDataset, data_root: str | None) -> InputError | None:
    try:
        dataset.find(data_root)
    except InputError as error:
        return error
    return None
