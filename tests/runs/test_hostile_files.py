"""Data sets, results and settings that are damaged or made to do harm: a sentence or a correct answer."""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from analysis.collect import collect
from analysis.tables.comparison import comparison, markdown
from baselines import rtn
from baselines.rtn import RTN
from quantease.grid import GridSpec
from quantease.layer import LayerProblem, LayerSolver, QuantizedLayer, Unsupported
from runners.config.build import PACKAGES, build
from runners.data.datasets import HubDataset
from runners.data.windows import Evaluation
from runners.errors import InputError
from runners.models.memory import Memory
from runners.quantization.finished_blocks import FinishedBlocks
from runners.results.layers import LayerRecord
from runners.results.metrics import METRICS
from runners.results.run_folder import RunFolder
from tests.conftest import PROJECT
from tests.hostile import damage, examples, json_values, sentence
from tests.problems import random_problem

# data sets

ROWS = HubDataset(folder="d", path="d", split="s", column="text")


def rows_of(content: bytes) -> list[str] | None:
    with tempfile.TemporaryDirectory() as root:
        file = Path(root) / "d" / "s.jsonl"
        file.parent.mkdir()
        file.write_bytes(content)
        return sentence(lambda: ROWS.rows(root))


@examples(100)
@given(texts=st.lists(st.text(max_size=10), min_size=1, max_size=4), data=st.data())
def test_rows_that_are_cut_off_are_a_beginning_or_refused(texts: list[str], data: st.DataObject) -> None:
    whole = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    assert rows_of(whole) == texts
    rows = rows_of(whole[: data.draw(st.integers(0, len(whole)))])
    assert rows is None or rows == texts[: len(rows)]


@examples(100)
@given(line=st.binary(max_size=40) | json_values().map(lambda value: json.dumps({"text": value}).encode()))
def test_rows_of_anything_are_texts_or_refused(line: bytes) -> None:
    for row in rows_of(line) or []:
        assert row.encode().decode() == row


@pytest.mark.parametrize(
    "line",
    [b'{"text": ' + b"[" * 10**5, b"[" * 10**6, b'{"text": "\\ud800"}', b"\0", b'{"text": ' + b"9" * 10**5 + b"}"],
)
def test_rows_that_are_made_to_harm(line: bytes) -> None:
    assert rows_of(line) is None


def test_a_row_may_be_long_and_hold_anything_that_is_text() -> None:
    text = "a\0b\u2028" * 10**6
    assert rows_of(json.dumps({"text": text}, ensure_ascii=False).encode()) == [text]


# results

ROW: dict[str, Any] = json.loads(
    min((PROJECT / "results" / "tiny" / "tiny").glob("quantease-3b-*/metrics.json")).read_text(encoding="utf-8")
)


def tables(run: Path) -> str:
    return markdown(comparison(collect(run.parents[1])))


# Whatever reads a file of a run's folder: the file's name, what is in it when all is well, the reader, and its errors.
READERS: dict[str, tuple[str, dict[str, Any], Callable[[Path], Any], tuple[type[Exception], ...]]] = {
    "a run that may be done": (METRICS, ROW, lambda run: RunFolder(run).metrics(), (InputError,)),
    "tables": (METRICS, ROW, tables, (ValueError, FileNotFoundError)),
}


@contextmanager
def run_folder(name: str, content: bytes, digest: str = ROW["digest"]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as place:
        run = Path(place) / "study" / "tiny" / f"quantease-3b-{digest}"
        run.mkdir(parents=True)
        (run / name).write_bytes(content)
        yield run


@pytest.mark.parametrize("reader", READERS)
def test_a_sound_file_is_read(reader: str) -> None:
    name, whole, read, _ = READERS[reader]
    with run_folder(name, json.dumps(whole).encode()) as run:
        assert read(run)


@pytest.mark.parametrize("reader", READERS)
@examples(80)
@given(data=st.data())
def test_a_file_of_results_with_anything_in_it(reader: str, data: st.DataObject) -> None:
    name, whole, read, errors = READERS[reader]
    changed = dict(whole)
    for key in data.draw(st.lists(st.sampled_from(sorted(whole)), max_size=2)):
        changed[key] = data.draw(json_values())
    for key in data.draw(st.lists(st.sampled_from(sorted(whole)), max_size=2)):
        changed.pop(key, None)
    text = json.dumps(changed).encode()
    content = data.draw(
        st.sampled_from([text]) | damage(text) | json_values().map(lambda value: json.dumps(value).encode())
    )
    with run_folder(name, content) as run:
        sentence(lambda: read(run), errors)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"null", b"[]", b"{}", b"[" * 10**5, b"9" * 10**5, b'{"status": []}']
)
def test_a_file_of_results_that_is_none(reader: str, content: bytes) -> None:
    name, _, read, errors = READERS[reader]
    with run_folder(name, content) as run:
        assert sentence(lambda: read(run), errors) is None


WRONG = [("ppl/stdlib_docs", "NaN"), ("ppl/stdlib_docs", float("nan")), ("ppl/stdlib_docs", float("inf"))]
WRONG += [("ppl/stdlib_docs", True), ("layers/mean_relative_error", None), ("status", "Done"), ("method", None)]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("key", "value"), WRONG)
def test_no_result_where_a_number_should_be(reader: str, key: str, value: Any) -> None:
    name, whole, read, errors = READERS[reader]
    with run_folder(name, json.dumps(whole | {key: value}).encode()) as run:
        assert sentence(lambda: read(run), errors) is None


def test_the_metrics_of_another_run_are_not_taken_for_its_own() -> None:
    with (
        run_folder(METRICS, json.dumps(ROW).encode(), digest="0123456789") as run,
        pytest.raises(InputError, match=f"is of another run, {ROW['digest']}"),
    ):
        RunFolder(run).metrics()


# Finished blocks

IDENTITY = {"configuration": {"bits": 3}, "model": "0123456789abcdef"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with one finished block."""
    folder = tmp_path_factory.mktemp("finished")
    blocks = FinishedBlocks(folder, IDENTITY)
    assert blocks.resume() == 0
    layers = {"fc1": RTN().solve(random_problem(8, 16), GridSpec(3))}
    record = LayerRecord(0, "fc1", 8, 16, relative_error=0.125, history=(0.5, 0.125))
    blocks.save(0, layers, {"records": [record], "memory": Memory().state, "seconds": {"solve": 1.5}})
    return folder


@pytest.mark.parametrize("name", ["identity.json", "block-00000.json", "block-00000.safetensors"])
@examples(80)
@given(data=st.data())
def test_a_damaged_block_is_not_there_or_as_it_was(name: str, data: st.DataObject, finished: Path) -> None:
    sound = FinishedBlocks(finished, IDENTITY)
    assert sound.resume() == 1
    weight = sound.layers(0, "cpu")["fc1"].weight
    whole = (finished / "checkpoint" / name).read_bytes()
    anything = json_values().map(lambda value: json.dumps(value).encode())
    content = data.draw(damage(whole) | anything | st.binary(max_size=30))
    with tempfile.TemporaryDirectory() as place:
        shutil.copytree(finished / "checkpoint", Path(place) / "checkpoint")
        (Path(place) / "checkpoint" / name).write_bytes(content)
        blocks = FinishedBlocks(Path(place), IDENTITY)
        if sentence(blocks.resume) == 1:
            assert blocks.manifests == sound.manifests
            assert torch.equal(blocks.layers(0, "cpu")["fc1"].weight, weight)


# _target_

TARGETS = [
    "os.system",
    "builtins.eval",
    "subprocess.Popen",
    "this.s",
    "antigravity.fly",
    "quantease.layer.os",
    "quantease",
]
TARGETS += [
    "runners.cli.start",
    "runners.run.experiment.run_cell",
    "runners.config.execution.Tracker",
    "runners.data.datasets.HubDataset",
]
TARGETS += [
    "quantease.layer.LayerSolver",
    "quantease..os.system",
    ".os.system",
    "quantease.\0",
    "baselines.rtn.RTN()",
    "\uff4fs.system",
]
TARGETS += ["quantease/../os.system", "runnersx.y", "runners.nothing.X", "runners.cli.logging.Logger"]


@pytest.mark.parametrize("target", [*TARGETS, 3, ["os.system"], {"_target_": "os.system"}, True])
def test_a_target_that_is_no_method_is_refused_and_not_imported(target: Any) -> None:
    with pytest.raises(InputError):
        build(LayerSolver, {"_target_": target}, "method")
    assert not {"this", "antigravity", "runnersx"} & set(sys.modules)


def test_a_method_that_lacks_a_member_of_the_protocol_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deriving from LayerSolver gives the defaults; a method that does not derive from it must have every member."""

    @dataclass(frozen=True)
    class OnlySolves:
        def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
            raise Unsupported("never asked")

    @dataclass(frozen=True)
    class Derives(LayerSolver):
        def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
            raise Unsupported("never asked")

    monkeypatch.setattr(rtn, "OnlySolves", OnlySolves, raising=False)
    monkeypatch.setattr(rtn, "Derives", Derives, raising=False)
    with pytest.raises(InputError, match="is not a LayerSolver"):
        build(LayerSolver, {"_target_": "baselines.rtn.OnlySolves"}, "method")
    assert build(LayerSolver, {"_target_": "baselines.rtn.Derives"}, "method").rows_independent is False


@pytest.mark.parametrize("target", ["os.system", "runners.config.execution.Tracker", "baselines.rtn.RTN"])
def test_a_target_that_is_no_data_set_is_refused(target: str) -> None:
    text = {"protocol": "gptq", "dataset": {"_target_": target}}
    with pytest.raises(InputError, match=r"texts\.a\.dataset\._target_ is"):
        build(Evaluation, {"texts": {"a": text}}, "evaluation")


@examples(100)
@given(package=st.sampled_from(["", *PACKAGES, "os", "json"]), rest=st.text(max_size=10), value=json_values())
def test_a_target_of_anything(package: str, rest: str, value: Any) -> None:
    for target in (f"{package}.{rest}", f"{package}.{rest}.run"):
        assert sentence(lambda target=target: build(LayerSolver, {"_target_": target, "x": value}, "method")) is None
    sentence(lambda: build(LayerSolver, value, "method"))
