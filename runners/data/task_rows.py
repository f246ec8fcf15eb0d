"""Rows of zero-shot tasks from a data root or from the standard library.

The definition of a task (prompts, choices, metrics) is always lm-eval's. Only the rows may come from here, in the columns
that the data set has on the hub; without a data root lm-eval downloads them itself.
"""

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runners.data.last_word import last_word_rows
from runners.errors import InputError, MissingData
from runners.storage.fingerprint import fingerprint

Row = dict[str, Any]


@dataclass(frozen=True)
class TaskData:
    """The data of one of the papers' tasks.

    Attributes:
        definition: lm-eval's YAML file, relative to its folder of tasks.
        dataset: the data set's name on the hub, and its configuration.
        split: the split that is measured on.
        columns: the columns that the prompts use; others are dropped, because lm-eval builds a table of all rows, and a
            column that nobody needs may have mixed types.
        is_sound: whether a row makes a question with an answer. May raise KeyError or TypeError for a row that does not.
        needs: the same in words, for error messages.
    """

    definition: str
    dataset: str
    split: str
    columns: tuple[str, ...]
    is_sound: Callable[[Row], bool]
    needs: str


def _texts(row: Row, *columns: str) -> bool:
    return all(isinstance(row[column], str) for column in columns)


def _arc_is_sound(row: Row) -> bool:
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    answers = len(texts) == len(labels) and row["answerKey"] in labels
    return answers and _texts(row, "question") and all(isinstance(text, str) and text for text in texts)


def _hellaswag_is_sound(row: Row) -> bool:
    endings = row["endings"]
    answers = isinstance(endings, list) and row["label"] in [str(place) for place in range(len(endings))]
    return (
        answers and _texts(row, "activity_label", "ctx_a", "ctx_b") and all(isinstance(text, str) for text in endings)
    )


def _arc(file: str, name: str) -> TaskData:
    needs = "a question, choices (text and label) and an answerKey that is one of the labels"
    return TaskData(
        file, f"allenai/ai2_arc, {name}", "test", ("question", "choices", "answerKey"), _arc_is_sound, needs
    )


TASKS = {
    "lambada_openai": TaskData(
        "lambada/lambada_openai.yaml",
        "EleutherAI/lambada_openai",
        "test",
        ("text",),
        lambda row: _texts(row, "text") and " " in row["text"],
        "a text of several words",
    ),
    "piqa": TaskData(
        "piqa/piqa.yaml",
        "baber/piqa",
        "validation",
        ("goal", "sol1", "sol2", "label"),
        lambda row: _texts(row, "goal", "sol1", "sol2") and type(row["label"]) is int and row["label"] in (0, 1),
        "goal, sol1 and sol2 as texts and the label 0 or 1",
    ),
    "arc_easy": _arc("arc/arc_easy.yaml", "ARC-Easy"),
    "arc_challenge": _arc("arc/arc_challenge.yaml", "ARC-Challenge"),
    "hellaswag": TaskData(
        "hellaswag/hellaswag.yaml",
        "Rowan/hellaswag",
        "validation",
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
        _hellaswag_is_sound,
        "activity_label, ctx_a, ctx_b and endings as texts and as label the number of an ending, in quotes",
    ),
    "winogrande": TaskData(
        "winogrande/default.yaml",
        "allenai/winogrande, winogrande_xl",
        "validation",
        ("sentence", "option1", "option2", "answer"),
        lambda row: _texts(row, "option1", "option2") and "_" in row["sentence"] and row["answer"] in ("1", "2"),
        'a sentence with a gap (_), option1 and option2 and the answer "1" or "2"',
    ),
}
BUNDLED = "stdlib_last_word"  # the task of `runners.data.last_word`


def task_version(name: str, data_root: str | None) -> str:
    """Which rows a task is measured on, for a run's digest: a fingerprint of the file, the Python's version, or `hub`."""
    if name == BUNDLED:
        return f"Python {platform.python_version()}"
    if data_root is None or name not in TASKS:
        return "hub"
    file = task_file(name, data_root)
    return fingerprint([file]) if file.is_file() else "missing"


def task_file(name: str, data_root: str) -> Path:
    """The file in a data root that holds the rows of a task, as an absolute path."""
    return Path(data_root).expanduser().absolute() / "lm_eval" / f"{name}.jsonl"


def read_task(name: str, file: Path) -> list[Row]:
    """The rows of a task from JSON lines, in the columns that its prompts use.

    Every row is checked: of a row without a right answer lm-eval would make a wrong accuracy, or an error after hours.

    Raises:
        MissingData: the file does not exist.
        InputError: a row is damaged (the message names its line), or the file has no rows.
    """
    task = TASKS[name]
    if not file.is_file():
        raise MissingData(
            f"the task {name} is not in the data root: there is no {file}. Put the split {task.split} of {task.dataset} "
            "there as JSON lines, or leave data_root out to take it from the hub"
        )
    rows = []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        row = _parse(line, task)
        if row is None:
            raise InputError(f"line {number} of {file} is no row of {name}, which is a JSON object with {task.needs}")
        rows.append({column: row[column] for column in task.columns})
    if not rows:
        raise InputError(f"{file} is empty: it should hold the split {task.split} of {task.dataset} as JSON lines")
    return rows


def _parse(line: bytes, task: TaskData) -> Row | None:
    try:
        row = json.loads(line)
        return row if task.is_sound(row) else None
    except (ValueError, KeyError, TypeError):
        return None


def rows_of_file(*, name: str, file: str, **_: Any) -> dict[str, Any]:
    """The rows of a task in a data root, as lm-eval's `custom_dataset` wants them: split to data set.

    Args:
        name: of the task.
        file: its JSON lines. Both come from the `dataset_kwargs` of the task's YAML file; lm-eval adds its metadata.
    """
    from datasets import Dataset

    return {TASKS[name].split: Dataset.from_list(read_task(name, Path(file)))}


def rows_of_library(**_: Any) -> dict[str, Any]:
    """The rows of the bundled task, as lm-eval's `custom_dataset` wants them: split to data set."""
    from datasets import Dataset

    return {"test": Dataset.from_list(last_word_rows())}
