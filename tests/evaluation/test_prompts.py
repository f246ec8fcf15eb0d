"""Zero-shot prompts in preflight: encoded as lm-eval will, refused with a reason, asked later just as they were checked."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from lm_eval import evaluate
from lm_eval.tasks import TaskManager
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from runners.evaluation import tasks
from runners.evaluation.lm_eval_model import LmEvalEncoder, LmEvalModel
from runners.evaluation.prompts import CheckedTasks, check_prompts
from runners.evaluation.tasks import ReadyTask, prepare_tasks
from runners.evaluation.zero_shot import measure_tasks
from runners.results import metrics as schema
from runners.results.metrics import OUT_OF_MEMORY
from runners.run import stages
from runners.run.experiment import run_experiment
from tests.conftest import TOKENIZER, ToySettings

LENGTH = 64  # tokens that the toy takes
WORDS = "the grid of the weights has four bits and every row is rounded to the grid"
PIQA = [
    {"goal": "read a file", "sol1": "open it and read it", "sol2": "close it", "label": 0},
    {"goal": "name it", "sol1": "value", "sol2": "the object", "label": 1},
]
MadeUp = Callable[..., ReadyTask]


@pytest.fixture(scope="module")
def tiny() -> Any:
    return AutoModelForCausalLM.from_pretrained(TOKENIZER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TOKENIZER)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> MadeUp:
    """A task that is made up of rows with a text and an answer, in any definition of lm-eval."""

    def make(rows: list[dict[str, str]], name: str = "made_up", **settings: Any) -> ReadyTask:
        definition = {"task": name, "dataset_path": "nobody/knows", "test_split": "test", "fewshot_split": "test"}
        definition |= {"output_type": "loglikelihood", "doc_to_text": "{{text}}", "doc_to_target": "{{answer}}"}
        definition |= {"target_delimiter": "", "metric_list": [{"metric": "acc"}]}
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.yaml").write_text(json.dumps(definition | settings))
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        data = datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
        monkeypatch.setattr(tasks, "hub_answers", lambda: True)
        monkeypatch.setattr(tasks, "_all_tasks", lambda: manager)
        (ready,), skipped = prepare_tasks([name], None)
        assert not skipped
        return ready

    return make


def check(ready: ReadyTask, tokenizer: PreTrainedTokenizerBase, length: int = LENGTH) -> CheckedTasks:
    return check_prompts([ready], tokenizer, AutoConfig.from_pretrained(TOKENIZER), length=length, limit=None)


def changed_tokenizer(folder: Path, change: Callable[[dict[str, Any]], None]) -> PreTrainedTokenizerBase:
    """The bundled tokenizer with another tokenizer.json."""
    folder.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


def with_special_token(*, before: bool) -> Callable[[dict[str, Any]], None]:
    """A change that puts the tokenizer's special token before, or behind, every text."""

    def change(content: dict[str, Any]) -> None:
        token = content["added_tokens"][0]
        special, text = (
            {"SpecialToken": {"id": token["content"], "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        )
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [special, text] if before else [text, special],
            "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                token["content"]: {"id": token["content"], "ids": [token["id"]], "tokens": [token["content"]]}
            },
        }

    return change


# -- what is checked is what is asked


@pytest.mark.parametrize("bos", [False, True])
def test_prompts_are_encoded_as_for_the_measurement(
    bos: bool, tiny: Any, made_up: MadeUp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"text": WORDS, "answer": " of bits"},
        {"text": f"{WORDS} ", "answer": "x"},
        {"text": "", "answer": "a row"},
    ]
    tokenizer = changed_tokenizer(tmp_path / "t", with_special_token(before=True) if bos else lambda _: None)
    checked = check(ready := made_up(rows), tokenizer)
    assert [task.name for task in checked.tasks] == ["made_up"]
    asked: list[Any] = []

    def note(_: Any, requests: list[Any], **__: Any) -> list[tuple[float, bool]]:
        asked.extend((prompt, answer) for _, prompt, answer in requests)
        return [(-1.0, False)] * len(requests)

    monkeypatch.setattr(LmEvalModel, "_loglikelihood_tokens", note)
    measure_tasks(tiny, tokenizer, checked.tasks, length=LENGTH, batch_size=1)
    encoder = LmEvalEncoder(tiny.config, tokenizer, LENGTH)
    pieces = [piece for request in ready.loaded["tasks"]["made_up"].instances for piece in encoder.encode(request)]
    assert [(piece.prompt, piece.answer) for piece in pieces] == asked
    assert len(asked) == 3
    assert checked.largest_id == max(max(prompt + answer) for prompt, answer in asked)


def test_the_check_changes_no_number(tiny: Any, tokenizer: PreTrainedTokenizerBase, made_up: MadeUp) -> None:
    """With examples in the prompts, which lm-eval would draw anew if it built the requests a second time."""
    rows = [{"text": f"{place} {WORDS[place:]}", "answer": f" {word}"} for place, word in enumerate(WORDS.split())]
    plain = measure_tasks(tiny, tokenizer, [made_up(rows, "shots", num_fewshot=2)], length=512, batch_size=1)
    checked = check(made_up(rows, "shots", num_fewshot=2), tokenizer, 512)
    assert len(rows) > 10
    assert plain["zero_shot/shots/samples"] == len(rows)
    for _ in range(2):  # and a task can be measured again
        assert measure_tasks(tiny, tokenizer, checked.tasks, length=512, batch_size=1) == plain


def test_lm_eval_would_draw_other_examples(tokenizer: PreTrainedTokenizerBase, made_up: MadeUp) -> None:
    rows = [{"text": f"{place} {WORDS}", "answer": " grid"} for place in range(12)]
    task = made_up(rows, num_fewshot=2).loaded["tasks"]["made_up"]
    built = []
    for _ in range(2):
        task.build_all_requests()
        built.append([request.args for request in task.instances])
    assert built[0] != built[1]


# -- what cannot be asked


@pytest.mark.parametrize(
    ("row", "settings", "reason"),
    [
        ({"answer": ""}, {}, "question 2 has an answer without tokens of its own"),
        ({"text": "", "answer": ""}, {}, "could not build and encode its prompts (IndexError"),
        ({"text": "  ", "answer": "x"}, {}, "question 2 has a prompt without tokens"),
        ({"answer": f" {WORDS}" * 9}, {}, "tokens, more than the 64 that the model takes"),
        (
            {"text": "short"},
            {"doc_to_text": "{{text.split(' ')[3].upper()}}"},
            "could not build and encode its prompts (Undef",
        ),
        (
            {"text": ""},
            {"output_type": "loglikelihood_rolling", "doc_to_target": "{{text}}"},
            "question 2 has no tokens",
        ),
        (
            {},
            {"output_type": "generate_until", "generation_kwargs": {"max_gen_toks": 64, "until": ["."]}},
            "question 1 lets the model write 64 tokens, not fewer than the 64 that the model takes",
        ),
    ],
)
def test_a_task_with_a_request_that_cannot_be_asked_is_skipped(
    row: dict[str, str], settings: dict[str, Any], reason: str, tokenizer: PreTrainedTokenizerBase, made_up: MadeUp
) -> None:
    sound = {"text": WORDS, "answer": " grid"}
    metric = {} if "output_type" not in settings else {"metric_list": [{"metric": "word_perplexity"}]}
    if settings.get("output_type") == "generate_until":
        metric = {"metric_list": [{"metric": "exact_match"}]}
    checked = check(made_up([sound, sound | row], **settings, **metric), tokenizer)
    assert not checked.tasks
    assert reason in checked.skipped["made_up"]


def test_other_kinds_of_requests_are_encoded_too(tokenizer: PreTrainedTokenizerBase, made_up: MadeUp) -> None:
    rows = [{"text": " ".join([WORDS] * 20), "answer": ""}]
    windows = {"output_type": "loglikelihood_rolling", "doc_to_target": "{{text}}"}
    checked = check(made_up(rows, **windows, metric_list=[{"metric": "word_perplexity"}]), tokenizer)
    assert [task.truncated for task in checked.tasks] == [{}]  # a long text is cut into windows, and all of it scored
    written = {"output_type": "generate_until", "generation_kwargs": {"max_gen_toks": 8, "until": ["."]}}
    task = made_up(rows, "written", **written, metric_list=[{"metric": "exact_match"}])
    assert [task.truncated for task in check(task, tokenizer).tasks] == [{"written": 1}]


def test_special_tokens_that_lm_eval_cannot_handle(made_up: MadeUp, tmp_path: Path) -> None:
    rows = [{"text": WORDS, "answer": " grid"}]
    checked = check(made_up(rows, "behind"), changed_tokenizer(tmp_path / "a", with_special_token(before=False)))
    assert "puts a special token behind every text" in checked.skipped["behind"]
    bare = changed_tokenizer(tmp_path / "b", lambda _: None)
    bare.bos_token = bare.eos_token = None
    assert "neither a BOS nor an EOS token" in check(made_up(rows, "bare"), bare).skipped["bare"]


def test_a_special_token_behind_would_shift_the_answer(tiny: Any, tmp_path: Path) -> None:
    """What the refusal is for: lm-eval would score the end of the text in place of the answer's first token."""
    tokenizer = changed_tokenizer(tmp_path / "t", with_special_token(before=False))
    prompt, answer = LmEvalEncoder(tiny.config, tokenizer, LENGTH)._encode_pair(WORDS, " grid of")
    assert tokenizer.convert_ids_to_tokens(answer)[-1] == tokenizer.eos_token
    assert prompt[-1] == tokenizer.eos_token_id
    assert "grid" not in tokenizer.decode(answer)


def test_prompts_whose_beginning_is_cut_are_counted(
    tiny: Any, tokenizer: PreTrainedTokenizerBase, made_up: MadeUp, caplog: pytest.LogCaptureFixture
) -> None:
    long = " ".join([WORDS] * 5)
    with caplog.at_level(logging.WARNING):
        checked = check(made_up([{"text": text, "answer": " grid"} for text in (WORDS, long, long)]), tokenizer)
    assert "2 of its prompts are longer than the 64 tokens of the model" in caplog.text
    metrics = measure_tasks(tiny, tokenizer, checked.tasks, length=LENGTH, batch_size=2)
    assert metrics["zero_shot/made_up/truncated"] == 2
    assert metrics["zero_shot/made_up/samples"] == 3


# -- whole runs


@pytest.fixture
def piqa(tmp_path: Path, data_root: Path) -> str:
    """A data root with PIQA and all texts."""
    root = Path(shutil.copytree(data_root, tmp_path / "root"))
    (root / "lm_eval").mkdir()
    (root / "lm_eval" / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PIQA))
    return str(root)


def zero_shot_settings(toy_settings: ToySettings, root: str, *more: str) -> Any:
    given = ("method=rtn", "evaluation.tasks=[piqa,stdlib_last_word]", "evaluation.limit=2", "batch_size=3")
    return toy_settings(*given, f"data_root={root}", *more)


def test_the_batch_size_is_stored_with_the_numbers(toy_settings: ToySettings, piqa: str) -> None:
    for row in run_experiment(zero_shot_settings(toy_settings, piqa)):
        assert row[schema.ZERO_SHOT_BATCH_SIZE] == 3
        assert {"zero_shot/piqa/acc", "zero_shot/stdlib_last_word/acc", "ppl/wikitext2"} <= row.keys()
        assert "truncated" not in "".join(key for key in row if "piqa" in key)
        assert json.loads((Path(row["folder"]) / "environment.json").read_text())["batch_size"] == 3


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ZeroDivisionError("in a filter"), "lm-eval could not measure it (ZeroDivisionError: in a filter)"),
        (torch.OutOfMemoryError("out of memory"), OUT_OF_MEMORY),
    ],
)
def test_an_error_in_a_task_costs_only_that_task(
    error: Exception, reason: str, toy_settings: ToySettings, piqa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_for_piqa(lm: Any, loaded: Any, **settings: Any) -> Any:
        if "piqa" in loaded["tasks"]:
            raise error
        return evaluate(lm, loaded, **settings)

    monkeypatch.setattr("lm_eval.evaluate", fail_for_piqa)
    (row,) = run_experiment(zero_shot_settings(toy_settings, piqa, "method=fp16"))
    assert row["status"] == "done"
    assert row["skipped/piqa"].startswith(reason)
    assert {"ppl/wikitext2", "zero_shot/stdlib_last_word/acc"} <= row.keys()
    assert not [key for key in row if "zero_shot/piqa" in key]


def test_a_model_that_cannot_be_loaded_as_a_whole_costs_only_the_tasks(
    toy_settings: ToySettings, piqa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("cannot be loaded")

    monkeypatch.setattr(stages, "whole_model", fail)
    (row,) = run_experiment(zero_shot_settings(toy_settings, piqa, "method=fp16"))
    assert row["status"] == "done"
    assert "ppl/wikitext2" in row
    assert "RuntimeError: cannot be loaded" in row["skipped/piqa"]
    assert row["skipped/stdlib_last_word"] == row["skipped/piqa"]


def test_an_interrupt_is_none_of_these_errors(
    tiny: Any, tokenizer: PreTrainedTokenizerBase, made_up: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lm_eval.evaluate", interrupt)
    ready = made_up([{"text": WORDS, "answer": " grid"}])
    with pytest.raises(KeyboardInterrupt):
        measure_tasks(tiny, tokenizer, [ready], length=LENGTH, batch_size=1)


def test_an_id_that_the_model_lacks_is_refused_before_calibration(
    toy_settings: ToySettings, model_copy: Path, piqa: str
) -> None:
    """It occurs in a prompt only: on a GPU it would have ended the process after the calibration."""
    file = model_copy / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 4096, "content": "<|large|>"})
    file.write_text(json.dumps(content), encoding="utf-8")
    (Path(piqa) / "lm_eval" / "piqa.jsonl").write_text(json.dumps(PIQA[0] | {"goal": "name <|large|>"}) + "\n")
    (row,) = run_experiment(zero_shot_settings(toy_settings, piqa, f"model.path={model_copy}"))
    assert (row["status"], row["stage"]) == ("failed", "preflight")
    assert "makes the id 4096, but the model has only 4096" in row["error"]


def test_tasks_that_cannot_be_asked_are_skipped_before_the_run(toy_settings: ToySettings, piqa: str) -> None:
    (Path(piqa) / "lm_eval" / "piqa.jsonl").write_text(json.dumps(PIQA[0] | {"sol1": "read it " * 80}) + "\n")
    (row,) = run_experiment(zero_shot_settings(toy_settings, piqa, "method=fp16"))
    assert row["status"] == "done"
    assert row["skipped/piqa"].startswith("1 of the 2 requests of piqa cannot be measured: question 1 has an answer of")
    assert "zero_shot/stdlib_last_word/acc" in row
