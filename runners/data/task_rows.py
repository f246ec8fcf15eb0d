"""Where the questions of zero-shot tasks come from: a data root, the standard library, or, as the harness has it, the hub.

A task's own definition (prompts, choices, metrics) always is lm-eval's, included from its file; only the rows may come
from elsewhere, in the hub's columns.
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
    """One of the papers' tasks.

    Attributes:
        definition: lm-eval's file, in its folder of tasks.
        dataset: the data set's name on the hub.
        split: the split that is measured on.
        columns: those that the task's prompts are made of.
        is_sound: whether a row can be asked and has an answer.
        needs: what that takes, in words.
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
BUNDLED = "stdlib_last_word"


def task_version(name: str, data_root: str | None) -> str:
    """Which rows a task is measured on, for a run's identity: a fingerprint of the file, the Python, or the hub's."""
    if name == BUNDLED:
        return f"Python {platform.python_version()}"
    if data_root is None or name not in TASKS:
        return "hub"
    file = task_file(name, data_root)
    return fingerprint([file]) if file.is_file() else "missing"


def task_file(name: str, data_root: str) -> Path:
    """Where a data root holds the rows of a task."""
    return Path(data_root).expanduser().absolute() / "lm_eval" / f"{name}.jsonl"


def read_task(name: str, file: Path) -> list[Row]:
    """The rows of a task from JSON lines, in the columns that its prompts are made of.

    Raises:
        MissingData: there is no such file.
        InputError: a row is not as it should be, naming its line; or there are none.
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
    """What lm-eval calls for the rows, with all that the task's file says under `metadata` and `dataset_kwargs`."""
    from datasets import Dataset

    return {TASKS[name].split: Dataset.from_list(read_task(name, Path(file)))}


def rows_of_library(**_: Any) -> dict[str, Any]:
    """The same for the bundled task."""
    from datasets import Dataset

    return {"test": Dataset.from_list(last_word_rows())}
