"""Commands made of typed functions: how words and settings become arguments, and what is said about mistakes."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from runners.arguments import invoke, start
from runners.errors import INTERRUPTED, WRONG_INPUT, InputError
from tests.conftest import PROJECT

COMMANDS = ["runners.status", "runners.sync", "runners.reports", "runners.benchmark", "analysis"]
called: list[Any] = []


def export(
    run: Annotated[Path, "the run's folder"],
    copy: Annotated[str, "the copy's name"] = "model",
    /,
    to: Annotated[Literal["dense", "packed"], "the format, with 100 % of the weights"] = "dense",
    bits: Annotated[int | None, "bits to expect"] = None,
    methods: Annotated[tuple[str, ...], "methods to take"] = ("rtn", "gptq"),
    dry_run: Annotated[bool, "write nothing"] = False,
) -> None:
    """Write a run."""
    called[:] = [run, copy, to, bits, methods, dry_run]


def show(study: Annotated[str, "the study"] = "tiny", /, **conditions: Annotated[str, "columns and values"]) -> None:
    """Show a study."""
    called[:] = [study, conditions]


def upload(entity: Annotated[str, "the owner"]) -> None:
    """Upload."""
    if entity == "interrupted":
        raise KeyboardInterrupt
    raise ValueError(f"{entity} is nobody")


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("r", [Path("r"), "model", "dense", None, ("rtn", "gptq"), False]),
        ("r mine to=packed bits=3", [Path("r"), "mine", "packed", 3, ("rtn", "gptq"), False]),
        ("--to packed --bits 3 r mine", [Path("r"), "mine", "packed", 3, ("rtn", "gptq"), False]),
        ("to=packed r --bits=3", [Path("r"), "model", "packed", 3, ("rtn", "gptq"), False]),
        ("methods=awq,spqr r", [Path("r"), "model", "dense", None, ("awq", "spqr"), False]),
        ("r --methods awq spqr --dry_run", [Path("r"), "model", "dense", None, ("awq", "spqr"), True]),
        ("r --methods", [Path("r"), "model", "dense", None, (), False]),
        ("methods= r dry_run=true", [Path("r"), "model", "dense", None, (), True]),
        ("show", ["tiny", {}]),
        ("show ppl/a=1=2 study=x night", ["night", {"ppl/a": "1=2", "study": "x"}]),
    ],
)
def test_words_and_settings_become_arguments(words: str, arguments: list[Any]) -> None:
    invoke(words.split(), export, show, upload)
    assert called == arguments


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "missing: run; see python -m tests.runs.test_arguments --help"),
        ("upload", "missing: entity; see python -m tests.runs.test_arguments upload --help"),
        ("r a b", "b is not understood: usage: python -m tests.runs.test_arguments"),
        (
            "r bit=3",
            "bit is not a setting: did you mean bits? There are to, bits, methods, dry_run, written as name=value",
        ),
        ("r --bit 3", "bit is not a setting: did you mean bits?"),
        ("r bits=x", "bits: invalid int value: 'x'"),
        ("r to=dence", "to: invalid choice: 'dence' (choose from 'dense', 'packed')"),
        ("r dry_run=yes", "dry_run: must be true or false, not 'yes'"),
    ],
)
def test_mistakes_get_a_sentence(words: str, sentence: str) -> None:
    with pytest.raises(InputError) as error:
        invoke(words.split(), export, show, upload)
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize(
    ("entity", "code", "said"),
    [("nono", WRONG_INPUT, "error: nono is nobody\n"), ("interrupted", INTERRUPTED, "interrupted\n")],
)
def test_errors_end_the_program_with_a_code(
    entity: str, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        start(export, upload, words=["upload", f"entity={entity}"], wrong=(ValueError,))
    assert leaving.value.code == code
    assert capsys.readouterr().err == said


def test_the_help_has_every_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        invoke(["--help"], export, show, upload)
    shown = " ".join(capsys.readouterr().out.split())
    for text in (
        "Write a run.",
        "the run's folder",
        "the format, with 100 % of the weights (default: dense)",
        "methods to take (default: rtn,gptq)",
        "write nothing (default: false)",
        "see also: python -m tests.runs.test_arguments show --help",
    ):
        assert text in shown
    with pytest.raises(SystemExit):
        invoke(["show", "--help"], export, show, upload)
    assert "NAME=VALUE: columns and values" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_page(command: str) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", command, "--help"], capture_output=True, text=True, check=True, cwd=PROJECT, timeout=120
    )
    assert answer.stdout.startswith(f"usage: python -m {command} ")
