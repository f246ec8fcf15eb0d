"""What can be said of inputs without reading weights or texts: are they there, do they fit the grid and the machine?

It is asked of every cell of a command before the first folder is made. What only reading shows (a damaged line, a text that
is too short, weights that are not finite) is found by the run's own preflight, and is a row.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch

from runners.config.layer_rules import check_rules
from runners.config.run import Run
from runners.config.settings import Settings
from runners.data.datasets import HubDataset
from runners.errors import InputError
from runners.evaluation.tasks import check_task_name
from runners.models.blocks import check_divisibility, refuse_experts, refuse_left_out
from runners.models.checkpoint import Model, model_skeleton


def input_problems(settings: Settings, is_run_here: bool) -> list[str]:
    """Why a cell cannot work, in sentences; none: nothing speaks against it.

    Args:
        is_run_here: False where another machine runs the cell, which may reach a hub, or have a cache, that this one does
            not. Files are looked for in either case: the run's digest is computed from them here.
    """
    problems = [] if not is_run_here else [_device_problem(settings.execution.device)]
    problems += [_task_problem(name) for name in settings.run.evaluation.tasks]
    found = [problem for problem in problems if problem is not None]
    return list(dict.fromkeys([*found, *_problems(settings.run, settings.execution.data_root, is_run_here)]))


def _problems(run: Run, data_root: str | None, is_run_here: bool) -> Iterator[str]:
    if is_run_here or (run.model.gguf is None and run.model.folder is not None):
        skeleton, problem = _opened(run.model, run.is_stored)
        if problem is None and run.quantizes:
            problem = _grid_problem(skeleton, run)
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


def _grid_problem(skeleton: Any, run: Run) -> str | None:
    try:
        check_model(skeleton, run)
    except InputError as error:
        return str(error)
    return None


def check_model(skeleton: Any, run: Run) -> None:
    """Refuse a model, given without its weights, whose layers a run cannot quantize as its settings say.

    Raises:
        InputError: the first thing that is wrong.
    """
    check_rules(skeleton, run.layers, run.grid)
    check_divisibility(skeleton, run.spec_of)
    refuse_left_out(skeleton, run.warnings)
    if run.needs_cross:
        refuse_experts(skeleton, run.method.name)


# The cells of a sweep share their inputs, and a problem takes as long to find as its absence: both are kept.


@lru_cache(maxsize=4)
def _opened(model: Model, stored: bool) -> tuple[Any, str | None]:
    """The model without its weights, or why it cannot be had."""
    try:
        return model_skeleton(model, stored=stored), None
    except InputError as error:
        return None, str(error)


@lru_cache(maxsize=64)
def _data_problem(dataset: HubDataset, data_root: str | None) -> str | None:
    try:
        dataset.find(data_root)
    except InputError as error:
        return str(error)
    return None


@lru_cache(maxsize=4)
def _device_problem(name: str | None) -> str | None:
    # Not opened, which takes memory of a GPU for as long as this process lives.
    device = torch.device(name or "cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        there = f"{torch.cuda.device_count()} GPUs" if torch.cuda.device_count() else "no GPU"
        return f"device={name} cannot be used: torch finds {there} on this machine; device=null takes what there is"
    return None


@lru_cache(maxsize=64)
def _task_problem(name: str) -> str | None:
    try:
        check_task_name(name)
    except InputError as error:
        return str(error)
    return None
