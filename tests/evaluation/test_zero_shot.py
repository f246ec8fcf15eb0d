"""Zero-shot tasks: the harness against likelihoods computed directly, its prompts, and what happens without the data."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from runners.data.last_word import LONGEST, SHORTEST, last_word_rows
from runners.data.stdlib import documents
from runners.data.task_rows import BUNDLED, TASKS
from runners.errors import InputError
from runners.evaluation import tasks
from runners.evaluation.tasks import prepare_tasks
from runners.evaluation.zero_shot import measure_tasks
from runners.results.tables import results_table
from runners.run.experiment import run_experiment
from tests.conftest import SHARED, TOKENIZER, ToySettings

LAST_WORD = "the grid of the weights has four bits and every row of the weights is rounded to the grid"
ROWS: dict[str, list[dict[str, Any]]] = {
    "lambada_openai": [{"text": LAST_WORD}, {"text": f"{LAST_WORD}. {LAST_WORD}, {LAST_WORD}; {LAST_WORD}"}],
    # The second question, its prompt and its second choice are, all together, the first one with its first choice, cut at
    # another place: the harness' cache of logits takes one for the other.
    "piqa": [
        {"goal": "name it", "sol1": "file\nAnswer: the object", "sol2": "a weight", "label": 0},
        {"goal": "name it\nAnswer: file", "sol1": "value", "sol2": "the object", "label": 1},
        {"goal": "read a file", "sol1": "open it and read it", "sol2": "close it", "label": 0},
    ],
    "arc_easy": [
        {
            "id": "1",
            "question": "What is stored in a list?",
            "choices": {"text": ["objects", "water", "light"], "label": ["A", "B", "C"]},
            "answerKey": "A",
        },
        {
            "id": "2",
            "question": "What is two?",
            "choices": {"text": ["a number", "a file"], "label": ["1", "2"]},
            "answerKey": "2",
        },
    ],
    "hellaswag": [
        {
            "ind": 3,
            "activity_label": "Removing ice",
            "ctx_a": "A man [title] is on a roof.",
            "ctx_b": "he",
            "ctx": "A man [title] is on a roof. he",
            "endings": ["reads  a book.", "[step] removes ice.", "flies.", "is a list."],
            "label": "1",
            "split": "val",
        }
    ],
    "winogrande": [
        {
            "sentence": "The file is in the folder because _ is large.",
            "option1": "file",
            "option2": "folder",
            "answer": "2",
        }
    ],
}
ROWS["arc_challenge"] = ROWS["arc_easy"]
SHARED_TASKS = SHARED / "data" / "lm_eval"
needs_shared = pytest.mark.skipif(
    not SHARED_TASKS.is_dir(), reason="the real evaluation data (../shared) is not on this machine"
)


def write_task(root: Path, name: str, rows: list[dict[str, Any]]) -> None:
    file = root / "lm_eval" / f"{name}.jsonl"
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def root(tmp_path: Path) -> str:
    """A data root with all tasks but arc_challenge."""
    for name, rows in ROWS.items():
        if name != "arc_challenge":
            write_task(tmp_path, name, rows)
    return str(tmp_path)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TOKENIZER)


@pytest.fixture(scope="module")
def tiny() -> Any:
    return AutoModelForCausalLM.from_pretrained(TOKENIZER, dtype=torch.float32).eval()


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, *_: Any, **__: Any) -> None:
        raise ConnectionError(f"Couldn't reach {path!r} on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr(tasks, "hub_answers", lambda: False)


def hub_with(monkeypatch: pytest.MonkeyPatch, splits: dict[str, list[dict[str, Any]]]) -> list[Any]:
    """A hub that gives every data set these rows; what it was asked for is noted."""
    asked: list[Any] = []

    def load_dataset(path: str, name: str | None = None, **_: Any) -> datasets.DatasetDict:
        asked.append((path, name))
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(tasks, "hub_answers", lambda: True)
    return asked


def prompts(name: str, data_root: str | None, limit: int | None = None) -> list[tuple[str, str]]:
    (ready,), skipped = prepare_tasks([name], data_root)
    assert not skipped
    task = ready.loaded["tasks"][name]
    task.build_all_requests(limit=limit)
    return [request.args for request in task.instances]


@torch.no_grad()
def direct(model: Any, tokenizer: Any, context: str, continuation: str, length: int) -> tuple[float, bool]:
    """The log-likelihood of a continuation, and whether it is the most likely one, with nothing but the model."""
    start = len(tokenizer(context)["input_ids"])
    ids = tokenizer(context + continuation)["input_ids"]
    count = len(ids) - start
    window = torch.tensor([ids[-(length + 1) :]])
    log_probabilities = model(window[:, :-1]).logits[0, -count:].double().log_softmax(-1)
    target = window[0, -count:]
    likelihood = log_probabilities.gather(1, target[:, None]).sum().item()
    return likelihood, bool((log_probabilities.argmax(-1) == target).all())


# -- numbers


@pytest.mark.parametrize(("length", "batch_size"), [(512, 1), (512, 3), (24, 2)])
def test_likelihoods_are_the_models_own(
    tiny: Any, tokenizer: PreTrainedTokenizerBase, root: str, length: int, batch_size: int
) -> None:
    ready, _ = prepare_tasks(["lambada_openai", "piqa"], root)
    metrics = measure_tasks(tiny, tokenizer, ready, length=length, batch_size=batch_size)
    answers: dict[str, list[tuple[float, bool]]] = {}
    for task in ready:
        for request in task.loaded["tasks"][task.name].instances:
            context, continuation = request.args
            likelihood, greedy = direct(tiny, tokenizer, context, continuation, length)
            assert request.resps[0][0] == pytest.approx(likelihood, abs=1e-4), request.args
            assert request.resps[0][1] == greedy
            answers.setdefault(task.name, []).append((likelihood, greedy))
    hits = [float(greedy) for _, greedy in answers["lambada_openai"]]
    assert metrics["zero_shot/lambada_openai/acc"] == statistics.mean(hits)
    perplexity = torch.tensor([-likelihood for likelihood, _ in answers["lambada_openai"]]).mean().exp().item()
    assert metrics["zero_shot/lambada_openai/perplexity"] == pytest.approx(perplexity, rel=1e-4)
    likelihoods = [likelihood for likelihood, _ in answers["piqa"]]
    pairs = zip(likelihoods[::2], likelihoods[1::2], ROWS["piqa"], strict=True)
    hits = [float((second > first) == bool(row["label"])) for first, second, row in pairs]
    assert metrics["zero_shot/piqa/acc"] == pytest.approx(statistics.mean(hits))
    assert metrics["zero_shot/piqa/acc_stderr"] == pytest.approx(statistics.stdev(hits) / len(hits) ** 0.5)
    assert metrics["zero_shot/piqa/samples"] == 3


def test_the_rows_would_show_the_harness_its_cache(root: str) -> None:
    whole = [context + continuation for context, continuation in prompts("piqa", root)]
    assert whole[0] == whole[3]


def test_a_number_does_not_depend_on_the_other_tasks(tiny: Any, tokenizer: PreTrainedTokenizerBase, root: str) -> None:
    together = ["piqa", "arc_easy", "lambada_openai", "winogrande", "hellaswag"]
    every = measure_tasks(tiny, tokenizer, prepare_tasks(together, root)[0], length=512, batch_size=4)
    for name in ("lambada_openai", "piqa"):
        alone = measure_tasks(tiny, tokenizer, prepare_tasks([name], root)[0], length=512, batch_size=4)
        assert alone == {key: value for key, value in every.items() if f"/{name}/" in key}


def test_limit_and_metrics(tiny: Any, tokenizer: PreTrainedTokenizerBase, root: str) -> None:
    ready, _ = prepare_tasks(["piqa", "hellaswag"], root)
    metrics = measure_tasks(tiny, tokenizer, ready, length=512, batch_size=4, limit=1)
    assert {key for key in metrics if "hellaswag" in key} == {  # of one question there is no standard error
        f"zero_shot/hellaswag/{name}" for name in ("acc", "acc_norm", "samples", "version", "sha256")
    }
    assert metrics["zero_shot/piqa/samples"] == 1
    assert metrics["zero_shot/piqa/version"] == "1.0"
    assert all(isinstance(value, str | int | float) for value in metrics.values())


def test_a_broken_model_has_no_accuracy(tokenizer: PreTrainedTokenizerBase, root: str) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(TOKENIZER, dtype=torch.float32).eval()
    model.model.decoder.layers[0].fc1.weight.data[0, 0] = float("nan")
    metrics = measure_tasks(model, tokenizer, prepare_tasks(["piqa"], root)[0], length=512, batch_size=4)
    assert metrics == {"skipped/piqa": "6 of the likelihoods that the model gives are NaN or infinite"}


def test_nothing_is_printed_but_the_progress(
    tiny: Any, tokenizer: PreTrainedTokenizerBase, root: str, capfd: pytest.CaptureFixture[str]
) -> None:
    measure_tasks(tiny, tokenizer, prepare_tasks(["lambada_openai"], root)[0], length=512, batch_size=4)
    printed, errors = capfd.readouterr()
    assert re.fullmatch(r"zero-shot lambada_openai: 2 of 2 steps, [\d.]+ \S+\n", printed)  # a line, as of every stage
    assert errors == ""  # lm-eval's logs and bars


# -- the bundled task


def test_the_bundled_model_guesses_some_last_words(tiny: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    metrics = measure_tasks(tiny, tokenizer, prepare_tasks([BUNDLED], None)[0], length=512, batch_size=4)
    assert metrics[f"zero_shot/{BUNDLED}/samples"] > 200
    assert 0.2 < metrics[f"zero_shot/{BUNDLED}/acc"] < 0.5
    assert 0 < metrics[f"zero_shot/{BUNDLED}/acc_stderr"] < 0.04
    assert metrics[f"zero_shot/{BUNDLED}/perplexity"] < 100  # a guess among all words: 4,096 and more


def test_passages_can_be_known_from_what_was_read() -> None:
    texts = [document.text for document in documents("docs", "evaluation")]
    rows = [row["text"] for row in last_word_rows()]
    for passage in rows:
        context, word = passage.rsplit(" ", 1)
        assert SHORTEST - 10 <= len(context.split()) <= LONGEST
        assert word.isalpha()
        assert word in context
        assert any(context in text for text in texts)
    assert len(set(rows)) == len(rows)


# -- prompts


@pytest.mark.parametrize("name", list(TASKS))
def test_the_data_root_gives_the_prompts_of_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's side is lm-eval's own definition with the splits and all columns that the hub has; the data are ours."""
    rows = ROWS[name]
    write_task(tmp_path, name, rows)
    ours = prompts(name, str(tmp_path))
    splits = ("train", "validation", "test") if TASKS[name].split == "test" else ("train", "validation")
    asked = hub_with(monkeypatch, dict.fromkeys(splits, rows))
    assert prompts(name, None) == ours
    assert len(ours) >= len(rows)
    ((path, config),) = asked
    assert TASKS[name].dataset.split(", ") == ([path, config] if ", " in TASKS[name].dataset else [path])


@needs_shared
@pytest.mark.parametrize("name", [name for name in TASKS if (SHARED_TASKS / f"{name}.jsonl").is_file()])
def test_real_data_give_the_prompts_of_the_hub(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (SHARED_TASKS / f"{name}.jsonl").read_bytes().splitlines()[:50]]
    write_task(tmp_path, name, rows)
    ours = prompts(name, str(tmp_path))
    hub_with(monkeypatch, dict.fromkeys(("train", "validation", "test"), rows))
    assert prompts(name, None) == ours


def test_the_prompts_are_the_published_ones(root: str) -> None:
    assert prompts("arc_easy", root)[0] == ("Question: What is stored in a list?\nAnswer:", " objects")
    assert prompts("piqa", root)[5] == ("Question: read a file\nAnswer:", " close it")
    assert prompts("lambada_openai", root)[0] == (LAST_WORD.removesuffix(" grid"), " grid")
    assert prompts("hellaswag", root)[0] == ("Removing ice: A man. is on a roof. He", " reads a book.")
    assert prompts("winogrande", root)[1] == ("The file is in the folder because folder", " is large.")


def test_contexts_that_are_not_split_are_marked(tiny: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    row = ROWS["hellaswag"][0]
    write_task(tmp_path, "hellaswag", [row | {"ctx_a": row["ctx"], "ctx_b": ""}])
    ready, _ = prepare_tasks(["hellaswag"], str(tmp_path))
    metrics = measure_tasks(tiny, tokenizer, ready, length=512, batch_size=4)
    assert metrics["zero_shot/hellaswag/version"] == "1.0 (contexts not split)"


# -- what is missing, damaged or unknown


def test_a_task_that_is_not_in_the_data_root_is_skipped(root: str) -> None:
    ready, skipped = prepare_tasks(["arc_challenge", "piqa"], root)
    assert [task.name for task in ready] == ["piqa"]
    assert skipped.keys() == {"arc_challenge"}
    assert f"there is no {root}/lm_eval/arc_challenge.jsonl" in skipped["arc_challenge"]


@pytest.mark.usefixtures("no_hub")
def test_without_a_hub_its_tasks_are_skipped() -> None:
    ready, skipped = prepare_tasks([*TASKS, BUNDLED], None)
    assert [task.name for task in ready] == [BUNDLED]
    assert skipped.keys() == TASKS.keys()
    assert "(EleutherAI/lambada_openai) cannot be had from the hub" in skipped["lambada_openai"]
    assert "data_root=FOLDER" in skipped["lambada_openai"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("lambada_openai", {"text": "word"}),
        ("lambada_openai", {"text": None}),
        ("piqa", {"label": 2}),
        ("piqa", {"sol2": 3}),
        ("arc_easy", {"answerKey": "D"}),
        ("arc_easy", {"choices": ["objects"]}),
        ("hellaswag", {"label": ""}),
        ("hellaswag", {"endings": "none"}),
        ("winogrande", {"sentence": "There is no gap."}),
        ("winogrande", {"answer": "3"}),
    ],
)
def test_a_damaged_row_is_named(name: str, change: dict[str, Any], tmp_path: Path) -> None:
    row = ROWS[name][0]
    write_task(tmp_path, name, [row, row | change])
    with pytest.raises(
        InputError, match=rf"^line 2 of .*{name}.jsonl is no row of {name}, which is a JSON object with"
    ):
        prepare_tasks([name], str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"[1]\n", b'{"text": "a\n', b"\xff\xfe\n"])
def test_a_damaged_file_is_named(content: bytes, tmp_path: Path) -> None:
    write_task(tmp_path, "lambada_openai", [])
    (tmp_path / "lm_eval" / "lambada_openai.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=r"lambada_openai.jsonl is (empty|no row)"):
        prepare_tasks(["lambada_openai"], str(tmp_path))


def test_any_other_task_by_its_name(
    tiny: Any, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"names bolq, which lm-eval does not know: did you mean .*boolq"):
        prepare_tasks(["bolq"], None)
    rows = [{"passage": "A list holds objects.", "question": "does a list hold objects", "label": 1}] * 2
    assert hub_with(monkeypatch, {"train": rows, "validation": rows}) == []
    ready, _ = prepare_tasks(["boolq"], None)
    metrics = measure_tasks(tiny, tokenizer, ready, length=512, batch_size=4)
    assert metrics["zero_shot/boolq/acc"] in (0.0, 1.0)
    assert metrics["zero_shot/boolq/samples"] == 2


METRIC = {"metric": "rouge", "hf_evaluate": True, "aggregation": "mean", "higher_is_better": True}


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"unsafe_code": True}, "runs code that the model writes"),
        ({"metric_list": [METRIC]}, "takes a metric from the hub"),
    ],
)
def test_no_code_comes_with_a_task(
    setting: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    definition = {
        "task": "theirs",
        "dataset_path": "nobody/knows",
        "test_split": "test",
        "output_type": "generate_until",
    }
    definition |= {"doc_to_text": "{{text}}", "doc_to_target": ""}
    (tmp_path / "theirs.yaml").write_text(json.dumps(definition | setting))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr(tasks, "_all_tasks", lambda: manager)
    hub_with(monkeypatch, {"test": [{"text": LAST_WORD}]})
    with pytest.raises(InputError, match=f"the task theirs {reason}"):
        prepare_tasks(["theirs"], None)


# -- whole runs


@pytest.mark.usefixtures("no_hub")
def test_a_run_measures_what_can_be_had(toy_settings: ToySettings, data_root: Path) -> None:
    settings = toy_settings("method=rtn", "evaluation=full", "evaluation.limit=5")
    reference, row = run_experiment(settings)
    for one in (reference, row):
        assert one["status"] == "done"
        assert one[f"zero_shot/{BUNDLED}/samples"] == 5
        assert 0 <= one[f"zero_shot/{BUNDLED}/acc"] <= 1
        assert {key for key in one if key.startswith("skipped/")} == {f"skipped/{name}" for name in TASKS}
        assert {key for key in one if key.startswith("ppl/")} == {
            f"ppl/{name}" for name in ("wikitext2", "c4", "ptb", "stdlib_docs", "stdlib_source")
        }
    assert row[f"zero_shot/{BUNDLED}/sha256"] == reference[f"zero_shot/{BUNDLED}/sha256"]
    table, facts = results_table([reference, row]).renderables
    assert any(str(column.header).startswith("acc %") for column in table.columns)  # pyright: ignore[reportAttributeAccessIssue]
    assert "not measured: lambada_openai, piqa, arc_easy" in str(facts)


@pytest.mark.usefixtures("no_hub")
def test_a_missing_text_is_skipped_only_where_that_is_allowed(toy_settings: ToySettings, tmp_path: Path) -> None:
    here = ("method=fp16", f"data_root={tmp_path}", "evaluation.tasks=[]", "evaluation.texts.stdlib_docs.max_windows=1")
    (row,) = run_experiment(toy_settings("evaluation=full", *here))
    assert row["status"] == "done"
    assert {key for key in row if key.startswith("skipped/")} == {"skipped/wikitext2", "skipped/c4", "skipped/ptb"}
    (row,) = run_experiment(toy_settings("evaluation=full", *here, "evaluation.skip_missing=false"))
    assert row["status"] == "failed"
    assert "wikitext2/test.jsonl" in row["error"]


def test_the_rows_of_a_task_belong_to_the_runs_identity(toy_settings: ToySettings, root: str) -> None:
    def settings(*overrides: str) -> Any:
        return toy_settings("method=fp16", "evaluation=zero_shot", "evaluation.tasks=[piqa]", *overrides)

    before = settings(f"data_root={root}").digest
    assert settings(f"data_root={root}", "evaluation.limit=2").digest != before
    write_task(Path(root), "piqa", ROWS["piqa"][:2])
    assert settings(f"data_root={root}").digest != before
    assert "tasks" not in toy_settings("method=fp16").identity()["evaluation"]
    assert toy_settings("evaluation.limit=3").digest == toy_settings().digest  # of questions that are not asked


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.limit=0", "evaluation.limit must be at least 1"),
        ("evaluation.tasks=piqa", "evaluation.tasks must be a list"),
        ("evaluation.tasks=[1]", r"evaluation.tasks\[0\] must be a text"),
        ("evaluation.tasks=[piqa,piqa]", "evaluation.tasks names piqa twice"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(override: str, message: str, toy_settings: ToySettings) -> None:
    with pytest.raises(InputError, match=message):
        toy_settings(override)


@needs_shared
def test_real_tasks(tiny: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    names = list(TASKS)
    ready, skipped = prepare_tasks(names, str(SHARED / "data"))
    assert set(skipped) == {name for name in names if not (SHARED_TASKS / f"{name}.jsonl").is_file()}
    metrics = measure_tasks(tiny, tokenizer, ready, length=512, batch_size=4, limit=20)
    for task in ready:
        assert 0 <= metrics[f"zero_shot/{task.name}/acc"] <= 1
        assert metrics[f"zero_shot/{task.name}/acc_stderr"] < 0.13
        assert metrics[f"zero_shot/{task.name}/samples"] == 20
