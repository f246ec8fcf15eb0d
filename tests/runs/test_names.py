"""Names that become folders, and paths with characters that Hydra's grammar, the shell or a table could misread."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from analysis.collect import collect
from analysis.series import summarize
from runners.arguments import invoke
from runners.config.command_line import check
from runners.config.overrides import parse, set_values
from runners.console import console
from runners.errors import InputError
from runners.names import MAX_BYTES, check_name
from runners.quoting import hydra_text, setting
from runners.results.metrics import METRICS, MODEL_PATH, SEAL, model_words
from runners.results.tables import cells_table, results_table
from runners.run.experiment import run_experiment
from runners.status import cells
from runners.sweeps.cells import describe_cells
from tests.conftest import ToySettings, save_toy
from tests.hostile import examples

ODD = "a (b), c=d#e%f ü [x]"  # a folder's name with everything that somebody may misread
TOO_LONG = "é" * (MAX_BYTES // 2 + 1)
NO_NAMES = ["", " ", ".", "..", "...", "a/b", "/a", "../a", "a/", "a\\b", "a\nb", "a\0b", "\x7f", "\udcff", TOO_LONG]


@pytest.mark.parametrize("name", NO_NAMES)
def test_a_name_that_is_no_single_folder_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"^study must be the name of a folder, not .*: .*; set study=NAME$") as error:
        check_name("study", name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a", "a b", ODD, "..a", ".a", "a.", "-", "é" * (MAX_BYTES // 2)])
def test_any_other_name_is_taken(name: str) -> None:
    assert check_name("study", name) == name


@pytest.mark.parametrize("name", ["..", "org/model", "/tmp/escape", "", TOO_LONG])
@pytest.mark.parametrize("key", ["study", "model.name", "method.name"])
def test_study_model_and_method_are_such_names(key: str, name: str) -> None:
    with pytest.raises(InputError, match=f"^{key} must be the name of a folder, not "):
        check([f"{key}={hydra_text(name)}"], multirun=False)


def test_so_are_the_names_of_tasks() -> None:
    with pytest.raises(InputError, match=r"not '\.\./piqa'"):
        check(["evaluation.tasks=[../piqa]"], multirun=False)


def test_a_path_without_a_name_needs_one() -> None:
    with pytest.raises(InputError, match=r"it is empty; set model\.name=NAME"):
        check(["model=local", "model.path=/"], multirun=False)


SIGNS = st.sampled_from(list("ab1e0_-./\\\"'(),=#%$ {}[]:~*@?|ü!&;<>`"))


@examples(100)
@given(text=st.text(SIGNS | st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=10))
def test_a_quoted_setting_is_read_back_by_shell_and_hydra(text: str) -> None:
    (word,) = shlex.split(setting("data_root", text))
    (override,) = parse([word], multirun=False, groups={})
    (again,) = parse(
        [f"data_root={override.get_value_element_as_str()}"], multirun=False, groups={}
    )  # as a launcher does
    for each in (override, again):
        config = OmegaConf.create({"data_root": None})
        set_values(config, [each], groups={})
        assert config.data_root == text


@pytest.mark.parametrize("text", [ODD, "/tmp/${x}", r"C:\a\${x}", "null", "1e3", "~/a", "'", '"', "\\", "a,b"])
def test_a_quoted_setting_reaches_the_settings(text: str) -> None:
    (word,) = shlex.split(setting("data_root", text))
    assert check([word], multirun=False)[0].execution.data_root == text


@pytest.mark.parametrize("path", [f"/tmp/{ODD}", "/tmp/a,b", "/tmp/a=b", "/tmp/ü", "/tmp/(a)", "~"])
def test_the_sentence_on_a_path_without_quotes_has_the_word_that_works(path: str) -> None:
    with pytest.raises(InputError) as error:
        check(["model=local", f"model.path={path}"], multirun=False)
    word = shlex.split(str(error.value)[str(error.value).rindex("model.path=") - 1 :].strip())[0]
    (settings,) = check(["model=local", "model.name=any", word], multirun=False)
    assert settings.run.model.path == str(Path(path).expanduser())


def test_a_run_in_folders_of_odd_names(toy_settings: ToySettings, toy_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(toy_model, tmp_path / ODD)
    odd = [f"model.path='{model}'", f"results='{tmp_path}/res, (1)'", f"study='{ODD}'"]
    settings = toy_settings("method=rtn", "evaluation.agreement=false", *odd)
    (reference, row) = run_experiment(settings)
    assert reference["status"] == row["status"] == "done"
    metrics = json.loads((tmp_path / "res, (1)" / ODD / ODD / settings.run_name / METRICS).read_text(encoding="utf-8"))
    assert metrics["model"] == ODD


def test_a_folder_with_an_equals_sign_is_no_setting(tmp_path: Path) -> None:
    given: list[tuple[str, dict[str, str]]] = []

    def command(
        study: Annotated[str, "a folder"] = "tiny", /, **conditions: Annotated[str, "columns and their values"]
    ) -> None:
        """Remember what was given."""
        given.append((study, conditions))

    folder = tmp_path / "a=b"
    folder.mkdir()
    for words in ([str(folder), "bits=3"], ["s (t), u=v"], [f"folder={folder}"], ["protocol/c4=gptq"]):
        invoke(words, command)
    assert given == [
        (str(folder), {"bits": "3"}),
        ("s (t), u=v", {}),
        ("tiny", {"folder": str(folder)}),
        ("tiny", {"protocol/c4": "gptq"}),
    ]


def test_two_models_of_one_name_in_a_study_are_two(toy_settings: ToySettings, toy_model: Path, tmp_path: Path) -> None:
    other = save_toy(tmp_path / "other" / toy_model.name, layers=1)
    both = [
        toy_settings("method=rtn", "evaluation.agreement=false", f"model.path={path}") for path in (toy_model, other)
    ]
    rows = [row for settings in both for row in run_experiment(settings)]
    assert {row[MODEL_PATH] for row in rows} == {settings.run.model_path for settings in both}
    names = {f"toy [{settings.run.model_path[:8]}]" for settings in both}
    assert len(names) == 2
    study = both[0].study_folder
    assert {row["model"] for row in describe_cells(both)} == names  # the table of a sweep
    assert {row["model"] for row in cells(study)} == names  # runners.status
    for file in study.glob(f"*/*/{METRICS}"):  # as runs were before their metrics had the key
        metrics = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({key: value for key, value in metrics.items() if key not in (MODEL_PATH, SEAL)}))
        break
    summary = summarize(collect(study))
    assert sorted((row["model"], row["method"], row["seeds"]) for row in summary) == sorted(
        (name, method, 1) for name in names for method in ("fp16", "rtn")
    )


def test_models_are_told_apart_only_where_they_share_a_name() -> None:
    runs = [{"model": name, MODEL_PATH: path} for name, path in [("a", "0123456789abcdef"), ("b", "org/b"), ("b", "b")]]
    assert model_words([*runs, {"model": "b"}]) == ["a", "b [org-b]", "b [b]", "b"]
    assert model_words(runs[:2] * 2) == ["a", "b"] * 2


def test_an_error_message_is_no_markup_in_the_terminal() -> None:
    message = "cannot read [/red] [bold]/models/[a]:smile: {x}"
    failed = {"status": "failed", "method": "rtn", "model": "m", "bits": 3, "setting": "[/]", "error": message}
    with console.capture() as captured:
        console.print(cells_table([failed]))
        console.print(results_table([failed]))
        console.print(f"m: {message}", highlight=False, soft_wrap=True)
    printed = " ".join(captured.get().split())
    assert printed.count(message) == 2
    assert printed.count("[/]") >= 2


def test_brackets_in_a_name_are_no_markup() -> None:
    done = {"status": "done", "method": "rtn", "bits": 3, "setting": ""}
    with console.capture() as captured:
        console.print(results_table([done | {"model": f"toy [{name}]"} for name in ("c092752d", "red")]))
    assert "toy [c092752d]" in captured.get()
    assert "toy [red]" in captured.get()
