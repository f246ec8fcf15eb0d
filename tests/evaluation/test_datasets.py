"""Data sets from a folder and from the hub, the standard library, and the windows and sequences cut from them."""

import ast
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from runners.config.command_line import check
from runners.data import stdlib
from runners.data.calibration import Calibration, draw_sequences
from runners.data.datasets import Dataset, HubDataset, StandardLibrary
from runners.data.stdlib import SHARES, Part, documents, part_of
from runners.data.token_ids import encode, ids_hash
from runners.data.windows import Text, cut_windows
from runners.errors import WRONG_INPUT
from runners.evaluation.likelihood import perplexity, window_losses
from runners.run.experiment import run_cell
from runners.storage.cache import Cache
from tests.conftest import PROJECT, SHARED, TOKENIZER, ToySettings, write_rows
from tests.families import random_ids, random_model

WIKITEXT = HubDataset("wikitext2", "Salesforce/wikitext", "test", "text", config="wikitext-2-raw-v1")
C4_TRAIN = HubDataset("c4", "allenai/c4", "train", "text", data_file="en/c4-train.00000-of-01024.json.gz")

needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the real evaluation data (../shared) is not on this machine"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TOKENIZER)


@pytest.fixture(scope="module")
def gpt2() -> PreTrainedTokenizerBase:
    folder = SHARED / "tokenizers" / "gpt2"
    bpe = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


# -- perplexity


@needs_shared
def test_wikitext2_has_the_published_number_of_tokens(gpt2: PreTrainedTokenizerBase) -> None:
    windows = cut_windows("wikitext2", Text("gptq", WIKITEXT), gpt2, 2048, str(SHARED / "data"))
    assert windows.tokens == 287_644
    assert windows.ids.shape == (140, 2048)  # the tail of 924 tokens is dropped
    assert windows.protocol == "gptq"


@needs_shared
def test_a_sample_of_c4_does_not_pass_for_the_protocol(gpt2: PreTrainedTokenizerBase) -> None:
    text = check(["evaluation=c4"], multirun=False)[0].run.evaluation.texts["c4"]
    windows = cut_windows("c4", text, gpt2, 2048, str(SHARED / "data"))
    assert windows.protocol == "gptq-new (300 documents)"
    assert len(windows.ids) <= 256


@needs_shared
def test_calibration_on_real_c4(gpt2: PreTrainedTokenizerBase) -> None:
    calibration = check(["model=opt-125m"], multirun=False)[0].run.calibration
    assert calibration is not None
    sequences = draw_sequences(calibration, gpt2, 512, seed=0, data_root=str(SHARED / "data")).used
    assert sequences.shape == (128, 512)


def test_windows_do_not_overlap_and_the_tail_is_dropped(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"text": f"Row {number} of a text."} for number in range(40)]
    write_rows(tmp_path / "wikitext2" / "test.jsonl", rows)
    ids = tokenizer("\n\n".join(row["text"] for row in rows))["input_ids"]
    windows = cut_windows("wikitext2", Text("gptq", WIKITEXT), tokenizer, 32, str(tmp_path))
    assert len(ids) % 32
    assert windows.ids.flatten().tolist() == ids[: len(ids) // 32 * 32]
    few = Text("gptq", WIKITEXT, join=" ", max_documents=20, max_windows=2)
    windows = cut_windows("wikitext2", few, tokenizer, 32, str(tmp_path))
    expected = tokenizer(" ".join(row["text"] for row in rows[:20]))["input_ids"]
    assert windows.ids.flatten().tolist() == expected[:64]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_window_losses_are_the_mean_log_likelihoods_of_the_tokens(batch_size: int) -> None:
    model, ids = random_model("llama"), random_ids(5)
    losses = torch.cat(list(window_losses(model, ids, batch_size)))
    for window, loss in zip(ids, losses, strict=True):
        log_probabilities = model(window[None]).logits[0].double().log_softmax(-1)
        expected = -sum(log_probabilities[t, window[t + 1]] for t in range(len(window) - 1)) / (len(window) - 1)
        assert loss == pytest.approx(float(expected), rel=1e-6)
    assert perplexity(losses) == pytest.approx(losses.mean().exp().item())


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    model = random_model("opt")
    model.model.decoder.embed_tokens.weight.zero_()  # tied to the head: all logits are equal
    assert perplexity(torch.cat(list(window_losses(model, random_ids(3), 2)))) == pytest.approx(128, rel=1e-5)


# -- calibration


def test_calibration_is_seeded(data_root: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    for calibration in (
        Calibration("c4", C4_TRAIN, "documents", num_sequences=8),
        Calibration("wikitext2", HubDataset("wikitext2", "", "train", "text"), "joined", num_sequences=8),
    ):
        first, again, other = (
            draw_sequences(calibration, tokenizer, 32, seed, str(data_root)).used for seed in (0, 0, 1)
        )
        assert first.shape == (8, 32)
        assert torch.equal(first, again)
        assert ids_hash(first) == ids_hash(again) != ids_hash(other)


def test_a_calibration_sequence_lies_within_one_document(data_root: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    calibration = Calibration("c4", C4_TRAIN, "documents", num_sequences=20, held_out=0)
    texts = [json.loads(line)["text"] for line in (data_root / "c4" / "train.jsonl").read_text().splitlines()]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    for sequence in draw_sequences(calibration, tokenizer, 32, 0, str(data_root)).used.tolist():
        assert any(sequence == document[i : i + 32] for document in ids for i in range(len(document) - 31))


@pytest.mark.parametrize("sampling", ["documents", "joined"])
def test_sequences_that_are_held_out_share_no_token_with_the_others(
    sampling: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [{"text": " ".join(f"{number * 100 + word}" for word in range(60))} for number in range(40)]
    write_rows(tmp_path / "c4" / "train.jsonl", rows)
    calibration = Calibration("c4", C4_TRAIN, sampling, num_sequences=12, held_out=6)
    both = draw_sequences(calibration, tokenizer, 32, 0, str(tmp_path))
    none = draw_sequences(replace(calibration, held_out=0), tokenizer, 32, 0, str(tmp_path))
    assert torch.equal(both.used, none.used)
    assert none.held_out is None
    assert both.held_out is not None
    assert both.held_out.shape == (6, 32)
    text = calibration.join.join(row["text"] for row in rows)
    ids = tokenizer(text)["input_ids"]
    if sampling == "joined":
        places = [[_place(ids, sequence.tolist()) for sequence in some] for some in (both.used, both.held_out)]
        assert all(abs(a - b) >= 32 for a in places[0] for b in places[1])
    else:
        documents = [tokenizer(row["text"])["input_ids"] for row in rows]
        of = [{_document(documents, sequence.tolist()) for sequence in some} for some in (both.used, both.held_out)]
        assert not of[0] & of[1]


def _place(ids: list[int], sequence: list[int]) -> int:
    return next(i for i in range(len(ids)) if ids[i : i + len(sequence)] == sequence)


def _document(documents: list[list[int]], sequence: list[int]) -> int:
    return next(n for n, ids in enumerate(documents) if any(ids[i : i + 32] == sequence for i in range(len(ids))))


def test_a_small_text_holds_out_fewer_and_says_so(data_root: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    calibration = Calibration("c4", C4_TRAIN, "documents", num_sequences=20)
    small = draw_sequences(calibration, tokenizer, 32, 0, str(data_root))
    assert len(small.used) == 20
    assert small.held_out is None
    few, none = small.notes
    assert small.documents == 12  # all that the data set has
    assert re.fullmatch(r"calibration=c4: 20 sequences are from 12 documents, \d+% of their tokens distinct", few)
    assert none.startswith("calibration=c4: 0 of 16 sequences are held out")
    assert none.endswith("layer errors on unseen tokens are not measured")
    enough = draw_sequences(replace(calibration, num_sequences=6, held_out=4), tokenizer, 32, 0, str(data_root))
    assert enough.notes == ()
    assert enough.documents == 6
    assert enough.distinct_tokens == 6 * 32


@pytest.mark.parametrize("sampling", ["documents", "joined"])
def test_distinct_tokens_are_places_of_the_text(
    sampling: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Of texts in which every word occurs once, so that a token's place is told by its neighbors."""
    rows = [{"text": " ".join(f"{number * 100 + word}" for word in range(60))} for number in range(4)]
    write_rows(tmp_path / "c4" / "train.jsonl", rows)
    calibration = Calibration("c4", C4_TRAIN, sampling, num_sequences=12, held_out=0)
    drawn = draw_sequences(calibration, tokenizer, 32, 0, str(tmp_path))
    texts = (
        [row["text"] for row in rows] if sampling == "documents" else [calibration.join.join(r["text"] for r in rows)]
    )
    documents = [tokenizer(text)["input_ids"] for text in texts]
    covered = set()
    for sequence in drawn.used.tolist():
        document = _document(documents, sequence)
        start = _place(documents[document], sequence)
        covered |= {(document, start + step) for step in range(32)}
    assert drawn.distinct_tokens == len(covered)


def test_no_window_is_held_out_twice(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """One document is left for 300 windows, and has fewer places than that; no word occurs twice in it."""
    rows = [{"text": " ".join(f"{number * 100 + word}" for word in range(60))} for number in range(4)]
    write_rows(tmp_path / "c4" / "train.jsonl", rows)
    calibration = Calibration("c4", C4_TRAIN, "documents", num_sequences=3, held_out=300)
    drawn = draw_sequences(calibration, tokenizer, 32, 0, str(tmp_path))
    assert drawn.held_out is not None
    assert len(drawn.held_out) == len(drawn.held_out.unique(dim=0)) < 300
    assert f"{len(drawn.held_out)} of 300 sequences are held out" in drawn.notes[-1]


def test_a_run_goes_on_without_held_out_sequences(toy_settings: ToySettings) -> None:
    run = run_cell(toy_settings("method=gptq", "calibration.num_sequences=20"))
    assert run["status"] == "done"
    assert run["calibration/held_out_sequences"] == 0
    assert run["calibration/documents"] == 12
    assert run["calibration/distinct_tokens"] < run["calibration/tokens"] == 20 * 64
    assert "0 of 16 sequences are held out" in run["calibration/notes"]
    assert "layers/mean_held_out_error" not in run
    assert "layers/mean_token_error" not in run


def part_read(dataset: Dataset) -> tuple[str, str]:
    """The part of a data set that is read: of the hub's a split, of the standard library its own."""
    if isinstance(dataset, HubDataset):
        return dataset.folder, dataset.split
    assert isinstance(dataset, StandardLibrary)
    return "stdlib", dataset.part


def test_no_calibration_is_drawn_from_what_is_evaluated() -> None:
    evaluated, calibrated = set(), set()
    for name in ("wikitext2", "c4", "ptb", "stdlib"):
        texts = check([f"evaluation={name}"], multirun=False)[0].run.evaluation.texts
        evaluated |= {part_read(text.dataset) for text in texts.values()}
    for name in ("wikitext2", "c4", "stdlib"):
        calibration = check([f"calibration={name}"], multirun=False)[0].run.calibration
        assert calibration is not None
        calibrated.add(part_read(calibration.dataset))
    assert not evaluated & calibrated


# -- the standard library


def test_the_parts_of_the_standard_library_are_disjoint() -> None:
    parts: tuple[Part, ...] = ("evaluation", "calibration", "validation")
    names = {part: {d.name for kind in ("docs", "source") for d in documents(kind, part)} for part in parts}
    assert not names["evaluation"] & names["calibration"]
    assert not (names["evaluation"] | names["calibration"]) & names["validation"]
    assert all(part_of(name) == part for part in parts for name in names[part])
    assert sum(SHARES.values()) == 100
    assert part_of("test.test_os") == "train"
    assert part_of("importlib") == "evaluation"  # frozen: another hash would mix training and evaluation


def test_a_modules_docstrings_are_in_its_docs_and_not_in_its_source() -> None:
    docs = {d.name: d.text for d in documents("docs", "evaluation")}
    source = {d.name: d.text for d in documents("source", "evaluation")}
    assert "Add dunder methods based on the fields defined in the class." in docs["dataclasses"]
    assert "Add dunder methods based on the fields defined in the class." not in source["dataclasses"]
    assert "def dataclass(" in source["dataclasses"]
    assert "def dataclass(" not in docs["dataclasses"]


def test_docstrings_come_in_the_order_of_all_nodes() -> None:
    """Whatever statement holds them: the texts, and so the hashes of their tokens, are those of a walk over all nodes."""
    text = """class A:
    def f(self): "f"
    match 1:
        case 1:
            def g(): "g"
try:
    def h(): "h"
except OSError:
    def i(): "i"
else:
    async def j(): "j"
finally:
    for _ in (lambda: 1, 2):
        class K: "K"
    while 0: pass
    else:
        def m(): "m"
"""
    tree = ast.parse(text)
    walked = [
        ast.get_docstring(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    found, _ = stdlib._separate(text, tree)
    assert found == [docstring for docstring in walked if docstring]
    assert len(found) == 7


def test_ids_of_a_long_text_are_kept_by_their_content(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    text = "a few words, many times over. " * 9000
    cache = Cache(tmp_path, limit_gb=1)
    ids = encode(tokenizer, text, cache=cache)
    assert torch.equal(ids, encode(tokenizer, text))
    assert (cache.hits, cache.misses) == (0, 1)
    assert torch.equal(encode(tokenizer, text, cache=cache), ids)
    assert cache.hits == 1
    other: Any = AutoTokenizer.from_pretrained(TOKENIZER)
    other.add_tokens(["words"])
    for tokens in (encode(tokenizer, text + "a", cache=cache), encode(other, text, cache=cache)):
        assert not torch.equal(tokens, ids)  # another text, another tokenizer
    assert cache.hits == 1
    encode(tokenizer, "short", cache=cache)
    assert cache.misses == 3


def test_the_standard_library_gives_enough_text(tokenizer: PreTrainedTokenizerBase) -> None:
    (settings,) = check([], multirun=False)
    for name, text in settings.run.evaluation.texts.items():
        assert len(cut_windows(name, text, tokenizer, 512, None).ids) == 64
    assert settings.run.calibration is not None
    assert draw_sequences(settings.run.calibration, tokenizer, 512, 0, None).used.shape == (128, 512)


def test_the_standard_library_is_identified_by_its_python() -> None:
    assert StandardLibrary("evaluation", "docs").version(None) == f"Python {sys.version.split()[0]}"


# -- no hub


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["evaluation=ptb"], "the data set ptb (ptb-text-only/ptb_text_only, test)"),
        (["calibration=c4"], "the data set c4 (allenai/c4, train)"),
        (["model=opt-125m"], "the model facebook/opt-125m"),
    ],
)
def test_no_hub_and_no_folder_is_one_sentence_within_seconds(arguments: list[str], named: str, tmp_path: Path) -> None:
    command = [sys.executable, str(PROJECT / "run.py"), *arguments, "tracker=none", f"results={tmp_path / 'results'}"]
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache")}  # a port that nobody serves
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("HF_", "QUANTEASE_"))
    } | nowhere
    start = time.monotonic()
    answer = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, env=environment)
    printed = answer.stdout + answer.stderr
    assert answer.returncode == WRONG_INPUT
    assert not (tmp_path / "results").exists()
    assert named in printed
    assert "Go online, or" in printed
    assert ("data_root=FOLDER" in printed) or ("model.path=FOLDER" in printed)
    assert "Traceback" not in printed
    assert time.monotonic() - start < 60  # most of it is imports; the hub's client alone would retry for longer


def test_a_run_says_where_the_token_stands_that_its_tokenizer_adds(
    model_copy: Path, toy_settings: ToySettings, data_root: Path
) -> None:
    def measured() -> dict[str, Any]:
        row = run_cell(toy_settings("method=fp16", f"model.path={model_copy}", "force=true"))
        return {key: row[f"{key}/wikitext2"] for key in ("bos", "sha256")}

    plain = measured()
    file = model_copy / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    token, number = content["added_tokens"][0]["content"], content["added_tokens"][0]["id"]
    first, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }
    file.write_text(json.dumps(content), encoding="utf-8")
    begun = measured()
    assert (plain["bos"], begun["bos"]) == ("none", "text")
    assert plain["sha256"] != begun["sha256"]
