"""Load zero-shot tasks as lm-eval defines them, in preflight.

What is here because of lm-eval 0.4.13 says so; each such place needs a look when its version changes.
"""

import difflib
import io
import json
import logging
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from runners.data.task_rows import BUNDLED, TASKS, task_file
from runners.errors import InputError, MissingData
from runners.hub import hub_answers, why_not

# The defaults of lm-eval's `simple_evaluate`, which is not used here: it would build a task manager of all its tasks.
PYTHON_SEED, NUMPY_SEED, FEWSHOT_SEED = 0, 1234, 1234


@dataclass(frozen=True)
class ReadyTask:
    """A task with its data, as lm-eval loads it.

    Attributes:
        name: of a task, or of a group or tag of tasks.
        loaded: what lm-eval's `evaluate` takes: a dictionary whose `tasks` holds the task, or the members of the group.
        truncated: of how many requests the model will not see the beginning, by the name of the member; filled in by
            `runners.evaluation.prompts`.
    """

    name: str
    loaded: Any
    truncated: dict[str, int] = field(default_factory=dict)


def prepare_tasks(names: Sequence[str], data_root: str | None) -> tuple[list[ReadyTask], dict[str, str]]:
    """Load tasks with their data.

    Args:
        names: of the papers' tasks, the bundled one, or any task, tag or group of lm-eval.
        data_root: folder with the rows of the papers' tasks, as `lm_eval/<task>.jsonl`; None: they are on the hub, as those
            of all other tasks always are.

    Returns:
        The tasks, and for each one whose data set is missing, or that lm-eval cannot load, the reason, in a sentence.

    Raises:
        InputError: no task has that name, its data are damaged, it needs a package that is not installed, or it runs code.
    """
    ready, skipped = [], {}
    for name in names:
        try:
            with silence():
                ready.append(ReadyTask(name, _load(name, data_root)))
        except MissingData as error:
            skipped[name] = str(error)
        except InputError:
            raise
        except Exception as error:  # a task may run any code of lm-eval: it must not cost the perplexities
            skipped[name] = explain_failure("load it", error)
    return ready, skipped


def check_task_name(name: str) -> None:
    """Check that a task exists; only names that are not ours need lm-eval's list, which takes seconds to read.

    Raises:
        InputError: no task, tag or group has that name.
    """
    known = [*TASKS, BUNDLED]
    if name in known:
        return
    with silence():
        manager = _all_tasks()
    if name not in manager.task_index:
        close = difflib.get_close_matches(name, {*known, *manager.all_tasks})
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise InputError(
            f"evaluation.tasks names {name}, which lm-eval does not know: {hint}The papers' tasks are {', '.join(known)}; "
            "`lm-eval ls tasks` lists all"
        )


def explain_failure(doing: str, error: BaseException) -> str:
    """Why a task is skipped, in a sentence: lm-eval could not do something with it."""
    message = " ".join(str(error).split())[:300]
    what = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return f"lm-eval could not {doing} ({what}): take it out of evaluation.tasks, or look at its data"


def set_seeds() -> None:
    """Seed the global generators as lm-eval does. Some tasks shuffle their choices when they are loaded or asked.

    Called before every task, not once, so that the prompts of a task do not depend on the tasks before it.
    """
    random.seed(PYTHON_SEED)
    np.random.seed(NUMPY_SEED)


def _load(name: str, data_root: str | None) -> Any:
    set_seeds()
    loaded = _load_own(name, data_root) if name == BUNDLED or name in TASKS else _load_any(name)
    for task in loaded["tasks"].values():
        _refuse_code(name, task)
        if (
            task.get_config("num_fewshot") is None
        ):  # as `simple_evaluate` does; a task that says otherwise keeps its shots
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


def _refuse_code(name: str, task: Any) -> None:
    """Refuse a task that would run code of the model or of the hub, or that gives the model more than text.

    Raises:
        InputError: the task does one of these.
    """
    # A metric that lm-eval does not define is loaded from the hub as code. `_load_any` has forbidden that, so its function
    # is None here (0.4.13). A task with its own `process_results` does not use the list.
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

    # A file, because lm-eval 0.4.13 refuses a dictionary that overrides a task of its own. Without its defaults, because
    # reading all its tasks takes 6 to 8 seconds.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, f"{name}.yaml").write_text(_definition(name, data_root), encoding="utf-8")
        manager = TaskManager(include_path=folder, include_defaults=False)
        if name == BUNDLED or data_root is not None:
            return manager.load([name])
        return _from_hub(manager, name, f"or name a folder that holds lm_eval/{name}.jsonl: data_root=FOLDER")


def _definition(name: str, data_root: str | None) -> str:
    """Text of a task's YAML file: it includes lm-eval's own definition, and takes the rows from here where they are local.

    Prompts, choices and metrics stay lm-eval's. Values are written as JSON, which is YAML too and quotes any path safely.
    """
    import lm_eval.tasks

    model = TASKS["lambada_openai"] if name == BUNDLED else TASKS[name]
    file = Path(lm_eval.tasks.__file__).parent / model.definition
    definition: dict[str, Any] = {"include": str(file), "task": name}
    function = None
    if name == BUNDLED:  # not a member of the tag `lambada`, and with a version of its own
        definition |= {"tag": None, "metadata": {"version": 1.0}}
        function = "rows_of_library"
    elif data_root is not None:
        definition["dataset_kwargs"] = {"name": name, "file": str(task_file(name, data_root))}
        function = "rows_of_file"
    if function is not None:  # only the split that is measured on: the others of the definition are not at hand
        splits = dict.fromkeys(("training_split", "validation_split", "test_split"))
        definition |= splits | {f"{model.split}_split": model.split, "dataset_path": "json", "dataset_name": None}
    lines = [f"{key}: {json.dumps(value)}" for key, value in definition.items()]
    if function is not None:
        lines.append(f"custom_dataset: !function runners.data.task_rows.{function}")
    return "\n".join(lines) + "\n"


def _load_any(name: str) -> Any:
    import evaluate

    evaluate.config.HF_EVALUATE_OFFLINE = True  # pyright: ignore[reportAttributeAccessIssue] - see `_refuse_code`
    check_task_name(name)
    manager = _all_tasks()
    return _from_hub(manager, name, "or leave it out of evaluation.tasks")


@lru_cache(maxsize=1)
def _all_tasks() -> Any:
    """lm-eval's manager of all its tasks, kept because reading some 15,000 names takes 6 to 8 seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _from_hub(manager: Any, name: str, remedy: str) -> Any:
    hub_answers()  # for its effect: without an answer, the hub's client takes what is cached instead of retrying for minutes
    try:
        return manager.load([name])
    except ImportError as error:
        raise InputError(f"the task {name} needs a package that is not installed ({error}): install it") from error
    except (
        Exception
    ) as error:  # the hub's client raises many unrelated classes: of its own, of HTTP, of the file system
        defined = (manager.task_index[name].cfg or {}).get("dataset_path", "several data sets")
        dataset = TASKS[name].dataset if name in TASKS else defined
        raise MissingData(
            f"what the task {name} reads ({dataset}) cannot be had from the hub ({why_not(error)}). Go online and "
            f"run it again with force=true, {remedy}"
        ) from error


@contextmanager
def silence() -> Iterator[None]:
    """Silence lm-eval (0.4.13), which logs, prints and draws progress bars of its own, and keep it to this process.

    Everything that it changes is restored at the end: logging level, progress bars, environment.
    """
    import datasets

    logger, level = logging.getLogger("lm_eval"), logging.getLogger("lm_eval").level
    bars = datasets.utils.are_progress_bars_disabled()
    processes = os.environ.get("DISABLE_MULTIPROC")
    # Its bootstrap would fork this process, which holds the model and threads: that doubles memory, or hangs.
    os.environ["DISABLE_MULTIPROC"] = "1"
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
