"""Load zero-shot tasks as lm-eval defines them, before anything is spent on the run that measures them."""

import difflib
import io
import json
import logging
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from runners.data.task_rows import BUNDLED, TASKS, task_file
from runners.errors import InputError, MissingData
from runners.hub import hub_answers, why_not

PYTHON_SEED, NUMPY_SEED, FEWSHOT_SEED = 0, 1234, 1234  # lm-eval's


@dataclass(frozen=True)
class ReadyTask:
    """A task whose data are at hand, as lm-eval loads it: the task, or the members of a group of that name."""

    name: str
    loaded: Any


def prepare_tasks(names: Sequence[str], data_root: str | None) -> tuple[list[ReadyTask], dict[str, str]]:
    """Load tasks with their data.

    Args:
        names: of the papers' tasks, the bundled one, or any task, tag or group of lm-eval.
        data_root: where the papers' tasks lie, as `lm_eval/<task>.jsonl`; None: on the hub, where all others are.

    Returns:
        The tasks, and for each one whose data set cannot be had the reason, in a sentence.

    Raises:
        InputError: there is no task of that name, its data are damaged, or it takes what is not here.
    """
    ready, skipped = [], {}
    for name in names:
        try:
            with silence():
                ready.append(ReadyTask(name, _load(name, data_root)))
        except MissingData as error:
            skipped[name] = str(error)
    return ready, skipped


def _load(name: str, data_root: str | None) -> Any:
    random.seed(PYTHON_SEED)  # some tasks shuffle their choices when they are loaded
    np.random.seed(NUMPY_SEED)
    loaded = _load_own(name, data_root) if name == BUNDLED or name in TASKS else _load_any(name)
    for task in loaded["tasks"].values():
        _refuse_code(name, task)
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


def _refuse_code(name: str, task: Any) -> None:
    """Neither the model's code nor the hub's is run."""
    metrics = getattr(task, "_metric_fn_list", {}) if task.get_config("process_results") is None else {}
    reasons = {
        "runs code that the model writes": getattr(task, "UNSAFE_CODE", False),
        "takes more than text": getattr(task, "MULTIMODAL", False),
        "takes a metric from the hub, which is code": None in metrics.values(),
    }
    for reason, holds in reasons.items():
        if holds:
            raise InputError(f"the task {name} {reason}: it is not measured here, take it out of evaluation.tasks")


def _load_own(name: str, data_root: str | None) -> Any:
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, f"{name}.yaml").write_text(_definition(name, data_root), encoding="utf-8")
        manager = TaskManager(include_path=folder, include_defaults=False)
        if name == BUNDLED or data_root is not None:
            return manager.load([name])
        return _from_hub(manager, name, f"or name a folder that holds lm_eval/{name}.jsonl: data_root=FOLDER")


def _definition(name: str, data_root: str | None) -> str:
    """A task's file for lm-eval, which includes the one of its own; JSON is YAML, and keeps any path whole."""
    import lm_eval.tasks

    model = TASKS["lambada_openai"] if name == BUNDLED else TASKS[name]
    file = Path(lm_eval.tasks.__file__).parent / model.definition
    definition: dict[str, Any] = {"include": str(file), "task": name}
    function = None
    if name == BUNDLED:
        definition |= {"tag": None, "metadata": {"version": 1.0}}
        function = "rows_of_library"
    elif data_root is not None:
        definition["dataset_kwargs"] = {"name": name, "file": str(task_file(name, data_root))}
        function = "rows_of_file"
    if function is not None:
        splits = dict.fromkeys(("training_split", "validation_split", "test_split"))
        definition |= splits | {f"{model.split}_split": model.split, "dataset_path": "json", "dataset_name": None}
    lines = [f"{key}: {json.dumps(value)}" for key, value in definition.items()]
    if function is not None:
        lines.append(f"custom_dataset: !function runners.data.task_rows.{function}")
    return "\n".join(lines) + "\n"


def _load_any(name: str) -> Any:
    import evaluate

    evaluate.config.HF_EVALUATE_OFFLINE = True  # pyright: ignore[reportAttributeAccessIssue] - see `_refuse_code`
    manager = _all_tasks()
    if name not in manager.task_index:
        known = [*TASKS, BUNDLED]
        close = difflib.get_close_matches(name, {*known, *manager.all_tasks})
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise InputError(
            f"evaluation.tasks names {name}, which lm-eval does not know: {hint}The papers' tasks are {', '.join(known)}; "
            "`lm-eval ls tasks` lists all"
        )
    return _from_hub(manager, name, "or leave it out of evaluation.tasks")


@lru_cache(maxsize=1)
def _all_tasks() -> Any:
    """Some 15,000 names: it takes seconds to read them."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _from_hub(manager: Any, name: str, remedy: str) -> Any:
    hub_answers()  # if not, what is cached
    try:
        return manager.load([name])
    except ImportError as error:
        raise InputError(f"the task {name} needs a package that is not installed ({error}): install it") from error
    except Exception as error:  # the hub's client has some twenty ways to say no
        defined = (manager.task_index[name].cfg or {}).get("dataset_path", "several data sets")
        dataset = TASKS[name].dataset if name in TASKS else defined
        raise MissingData(
            f"what the task {name} reads ({dataset}) cannot be had from the hub ({why_not(error)}). Go online and "
            f"run it again with force=true, {remedy}"
        ) from error


@contextmanager
def silence() -> Iterator[None]:
    """Keep lm-eval quiet: it speaks on both channels, with bars of its own."""
    import datasets

    logger, level = logging.getLogger("lm_eval"), logging.getLogger("lm_eval").level
    bars = datasets.utils.are_progress_bars_disabled()
    processes = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"  # its bootstrap would fork this process, with the model and its threads
    logger.setLevel(logging.CRITICAL)
    datasets.utils.disable_progress_bars()
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.utils.enable_progress_bars()
        if processes is None:
            del os.environ["DISABLE_MULTIPROC"]
