"""The command line: a typing error gets a sentence, in seconds, with nothing loaded and nothing written."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runners import cli
from runners.config.command_line import CommandLine, check, configuration, read
from runners.config.hydra_internals import options_of_group, parse_arguments
from runners.config.settings import Settings
from runners.errors import InputError
from tests.conftest import PROJECT


def run(*arguments: str, cwd: Path = PROJECT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROJECT / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


WRONG = {
    "metod=gptq": "there is no setting metod: did you mean method?",
    "method=gtpq": "there is no method=gtpq: did you mean gptq?",
    "bits=three": 'bits must be a whole number, not "three"',
    "bits=1": "bits must lie in 2 to 8, not 1",
    "bits=3.5": "bits must be a whole number, not 3.5",
    "bits=null": "bits must be a whole number, not null",
    "bits=true": "bits must be a whole number, not true",
    "bits=2,3": "bits=2,3 names several values: add -m",
    "bits=[1": "settings are written as name=value",
    "bits": "settings are written as name=value",
    "~bits": "cannot be taken away",
    "group_size=0": "group_size must be a positive number of columns or null, not 0",
    "group_size=half": 'group_size must be a whole number, not "half"',
    "symmetric=1": "symmetric must be true or false, not 1",
    "scale_bits=8": "scale_bits must be 16 or 32, not 8",
    "+method.foo=1": "there is no setting method.foo: there are name, num_iters",
    "++method.foo=1": "there is no setting method.foo",
    "method.num_iter=3": "there is no setting method.num_iter: did you mean num_iters?",
    "method.num_iters=0": "method.num_iters must be at least 1, not 0",
    "method.init=gtpq": "there is no method gtpq for method.init: did you mean gptq?",
    "method.init=fp16": "fp16 does not quantize, so it has no answer to start from",
    "method.init=3": "method.init must be a mapping that says with _target_ which class to build, not 3",
    "method._target_=os.system": "only classes of quantease, baselines, runners may be built",
    "method._target_=quantease.nothing.Nothing": "which does not exist",
    "method._target_=quantease.layer.objective": "which is not a dataclass",
    "+zzz=1": "there is no setting zzz: there are method",
    "+model.trust_remote_code=true": "there is no setting model.trust_remote_code",
    "model=local": "model.path is missing: set model.path=",
    "model=opt-13": "there is no model=opt-13: did you mean opt-13b?",
    "model.dtype=int8": "model.dtype must be one of float32, float16, bfloat16 or null, not int8",
    "model.sequence_length=1": "model.sequence_length must be at least 2, not 1",
    "calibration.num_sequences=0": "calibration.num_sequences must be at least 1, not 0",
    "calibration.sampling=best": "calibration.sampling must be documents or joined, not best",
    "evaluation=c5": "there is no evaluation=c5",
    "tracker.mode=up": "tracker.mode must be online, offline or null, not up",
    "device=gpu": "device must be cpu, cuda or cuda:N, not 'gpu'",
    "batch_size=0": "batch_size must be at least 1, not 0",
    "study=../other": "study must be the name of a folder",
    "results=/proc/nowhere": "nothing can be written to /proc/nowhere/runs",
}


def assert_refused(argument: str, sentence: str, multirun: bool) -> None:
    """The command line is refused in one line that has the sentence in it."""
    with pytest.raises(InputError) as error:
        check([argument], multirun=multirun)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("argument", WRONG)
def test_a_typing_error_gets_a_sentence(argument: str) -> None:
    assert_refused(argument, WRONG[argument], multirun=False)


@pytest.mark.parametrize("argument", ["metod=gptq", "bits=three", "bits=1", "+method.foo=1"])
@pytest.mark.parametrize("sweep", [[], ["-m"]], ids=["single", "sweep"])
def test_the_sentence_is_all_there_is(
    argument: str, sweep: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", argument, *sweep])
    with pytest.raises(SystemExit) as leaving:
        cli.start(lambda: pytest.fail("nothing may run"))
    assert leaving.value.code == cli.WRONG_INPUT
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1


def test_a_wrong_value_anywhere_in_a_sweep_stops_it_before_it_starts() -> None:
    with pytest.raises(InputError, match="bits must lie in 2 to 8, not 9"):
        check(["method=rtn,gptq", "bits=2,9"], multirun=True)


SEEDS = {
    "sort(range(0,5,2),reverse=true)": [4, 2, 0],
    "sort(range(0,5,2))": [0, 2, 4],
    "sort(range(5,0,-2))": [1, 3, 5],
    "sort(3,1,2)": [1, 2, 3],
    "sort(choice(3,1),reverse=false)": [1, 3],
    "range(1,4)": [1, 2, 3],
    "choice(7)": [7],
}


@pytest.mark.parametrize("expression", SEEDS)
def test_a_sweep_over_a_list_has_its_values_in_order(expression: str) -> None:
    cells = check(["method=rtn", f"seed={expression}"], multirun=True)
    assert [cell.run.seed for cell in cells] == SEEDS[expression]


GPTQS = ("gptq", "gptq_quantease", "gptq_refit")  # what gptq* names


def test_what_starts_the_cells_reads_the_values_that_were_checked() -> None:
    with configuration():
        command = read(["method=glob(gptq*)", "seed=shuffle(range(0,5))"], multirun=True)
    seeds = [cell.run.seed for cell in command.cells][:5]
    assert sorted(seeds) == [0, 1, 2, 3, 4]
    assert [cell.run.method.name for cell in command.cells] == [name for name in GPTQS for _ in range(5)]
    assert list(command.composed.hydra.overrides.task) == [
        f"method={','.join(GPTQS)}",
        f"seed={','.join(map(str, seeds))}",
    ]


def test_a_list_in_quotes_may_have_spaces() -> None:
    assert [cell.run.bits for cell in check(["method=rtn", "bits=3, 4"], multirun=True)] == [3, 4]


def test_another_method_to_start_from_is_named() -> None:
    """`method.init=NAME` is the other method's file, with its defaults, as a defaults list has it."""
    (composed,) = check(["method=gptq_quantease", "method.name=quantease"], multirun=False)
    (named,) = check(["method.init=gptq"], multirun=False)
    assert named == composed
    assert named.digest == composed.digest
    cells = check(["method.init=null,gptq,spqr_1pct"], multirun=True)
    assert [type(getattr(cell.run.method.solver, "init", None)).__name__ for cell in cells] == [
        "NoneType",
        "GPTQ",
        "SpQR",
    ]
    assert getattr(getattr(cells[2].run.method.solver, "init", None), "outlier_ratio", None) == 0.01


NO_SWEEPS = {
    "method=glob(zzz*)": "method=glob(zzz*) names no value: there are admm_q, awq",
    "seed=glob(*)": "glob chooses among the files of a group",
    "seed=range(5,0)": "seed=range(5,0) names no value",
    "seed=range(0,5,0)": "must not be zero",
    "seed=range(0,1e9)": "names more than 10,000 values",
    "seed=interval(0,3)": "has no list of values: use a,b or range(start,stop,step)",
    "seed=sort(3,a)": "cannot be read",
    "seed=many(3)": "Unknown function 'many'",
    "hydra.sweeper.params.bits=3,4": "a setting of Hydra's own has one value",
    "bits@group=3,4": "is not a setting",
}


@pytest.mark.parametrize("argument", NO_SWEEPS)
def test_a_sweep_without_a_list_of_values_is_refused(argument: str) -> None:
    assert_refused(argument, NO_SWEEPS[argument], multirun=True)


@pytest.mark.parametrize("place", range(4))
def test_the_option_of_a_sweep_may_be_anywhere(place: int) -> None:
    settings = ["method=rtn", "bits=3,4", "seed=1"]
    options, words = parse_arguments([*settings[:place], "-m", *settings[place:]])
    assert options.multirun
    assert options.overrides == settings
    assert words == ["-m", *settings]  # which Hydra's own parser understands


NO_OPTIONS = {
    "--method=gptq": "there is no option --method=gptq: settings are written without dashes, as method=gptq",
    "--method gptq": "there is no option --method: settings are written without dashes, as method=gptq;",
    "--method bits=3": "there is no option --method: settings are written without dashes, as method=VALUE;",
    "bits=3 --method": "there is no option --method: settings are written without dashes, as method=VALUE;",
    "-m bits=3, 4 seed=0": "bits=3, 4 is 2 words: write a list without spaces, bits=3,4",
    "-m method=rtn, gptq, awq": "method=rtn, gptq, awq is 3 words: write a list without spaces, method=rtn,gptq,awq",
    "bits=3 ,4 -m": "bits=3 ,4 is 2 words: write a list without spaces, bits=3,4",
    "-1": "'-1' is not a setting: settings are written as name=value",
    "--multi bits=2,3": "there is no option --multi",
    "--help=method": "ignored explicit argument 'method'",
    "--cfg": "expected one argument",
    "--cfg method": "invalid choice: 'method'",
    "--cfg job metod=gptq": "there is no setting metod: did you mean method?",
    "--cfg job method=gtpq": "there is no method=gtpq: did you mean gptq?",
    "--shell-completion": "--shell-completion needs install=bash",
    "--experimental-rerun run.pickle": "reads a pickle, which can run any code",
    "help": "'help' is not a setting: settings are written as name=value",
}


@pytest.mark.parametrize("line", NO_OPTIONS)
def test_an_option_that_is_none_gets_a_sentence_and_no_usage_page(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", *line.split()])
    with pytest.raises(SystemExit) as leaving:
        cli.start(lambda: pytest.fail("nothing may run"))
    assert leaving.value.code == cli.WRONG_INPUT
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert NO_OPTIONS[line] in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("line", ["--help method", "metod=gptq -h", "bits=9 --help"])
def test_help_is_shown_whatever_else_is_typed(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", *line.split()])
    shown: list[list[str]] = []
    cli.start(lambda: shown.append(sys.argv[1:]))
    assert shown == [["--help"]]


def test_a_reader_that_stops_reading_ends_the_program_quietly() -> None:
    answer = subprocess.run(
        ["bash", "-c", f"{sys.executable} run.py --help | head -n 1"], capture_output=True, text=True, cwd=PROJECT
    )
    assert answer.stdout.startswith("QuantEase Bench")
    assert answer.stderr == ""


def test_a_group_size_that_does_not_divide_names_the_layer(tmp_path: Path) -> None:
    start = time.monotonic()
    answer = run("group_size=100", f"results={tmp_path / 'new'}")
    assert answer.returncode == cli.WRONG_INPUT
    assert answer.stdout == ""
    assert answer.stderr.startswith("error: group_size=100 does not divide the 192 inputs of self_attn.")
    assert answer.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
    assert time.monotonic() - start < 60


def test_a_sweep_goes_on_after_a_failing_cell_and_exits_non_zero(
    tmp_path: Path, toy_model: Path, data_root: Path
) -> None:
    toy = ["model=local", f"model.path={toy_model}", "calibration=wikitext2", "evaluation=wikitext2"]
    sweep = [
        "method=fp16,rtn",
        "calibration.num_sequences=1000,4",
        f"data_root={data_root}",
        f"results={tmp_path}",
        "tracker=none",
    ]
    answer = run(*toy, *sweep, "-m")  # -m at the end, as people type it
    assert answer.returncode == cli.FAILED
    assert "Traceback" not in answer.stdout + answer.stderr
    assert "fewer than the 1000 sequences of 64" in answer.stdout  # which only tokenizing the text shows
    assert "1 of 3 cells failed" in answer.stdout  # fp16 is one cell: no calibration touches it
    table = answer.stdout[answer.stdout.index("method") :]
    assert table.index("fp16") < table.index("rtn")
    assert "num_sequences=1000" in table
    assert "num_sequences=4" in table
    assert len(list(tmp_path.glob("runs/toy/rtn-3b-*/layers.csv"))) == 1
    assert (tmp_path / ".last_study").read_text() == "runs"


def test_help_is_a_page_for_newcomers() -> None:
    answer = run("--help")
    assert answer.returncode == 0
    for word in ("quantease", "gptq", "opt-13b", "tiny", "python run.py method=", "Examples", "-m"):
        assert word in answer.stdout
    assert len(answer.stdout.splitlines()) < 50
    assert max(map(len, answer.stdout.splitlines())) <= 120
    assert "_target_" not in answer.stdout


def own_method(folder: Path, name: str) -> Path:
    """A folder for --config-dir with one method."""
    (folder / "method").mkdir(parents=True)
    (folder / "method" / f"{name}.yaml").write_text(f"name: {name}\n_target_: baselines.rtn.RTN\n")
    return folder


def test_methods_of_a_folder_of_ones_own_are_checked_and_listed_like_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = own_method(tmp_path / "my conf", "loud")
    with configuration(str(folder)):
        swept = read(["method=loud,rtn", "bits=2,3"], True).cells
        assert [cell.run.method.name for cell in swept] == ["loud", "loud", "rtn", "rtn"]
        assert options_of_group("method").count("loud") == 1
        with pytest.raises(InputError, match=r"there is no method=lodu: did you mean loud\?"):
            read(["method=lodu"], False)
    with pytest.raises(InputError, match="there is no method=loud"):  # the folder is forgotten with its command
        check(["method=loud"], False)
    seen: list[CommandLine] = []
    monkeypatch.setattr(cli, "_run", lambda command, multirun: seen.append(command))
    monkeypatch.setattr(sys, "argv", ["run.py", "method=loud", "--config-dir", str(folder)])
    cli.start(lambda: pytest.fail("it was left to Hydra"))
    assert seen[0].words == (f"--config-dir={folder}", "method=loud")  # which the next command needs, too


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        (lambda folder: None, "is not a folder"),
        (lambda folder: folder.mkdir(), "holds no file of a conf group, such as method/mine.yaml"),
        (lambda folder: own_method(folder, "rtn"), "has the name of a file in conf/, which would be read instead"),
    ],
)
@pytest.mark.parametrize("words", [["method=rtn"], ["--help"], ["--cfg", "job"]])
def test_a_folder_of_ones_own_that_cannot_be_used_gets_a_sentence(
    prepare: Callable[[Path], object], sentence: str, words: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    prepare(tmp_path / "mine")
    monkeypatch.setattr(sys, "argv", ["run.py", "--config-dir", str(tmp_path / "mine"), *words])
    with pytest.raises(SystemExit) as ended:
        cli.start(lambda: pytest.fail("Hydra was asked"))
    printed = capsys.readouterr()
    assert (ended.value.code, printed.out) == (cli.WRONG_INPUT, "")
    assert sentence in printed.err


@pytest.mark.parametrize("name", ["experiment=tiny", "+experiment=tiny"])
def test_experiments_are_swept_with_or_without_a_plus(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells: list[Settings] = []
    monkeypatch.setattr(cli, "register_cells", lambda *_: None)
    monkeypatch.setattr(cli, "_summarize", lambda found, *_: cells.extend(found))
    monkeypatch.setattr(cli, "launch", lambda _cfg, _job: None)
    monkeypatch.setattr(sys, "argv", ["run.py", "-m", name, "method=fp16,rtn", f"results={tmp_path}"])
    cli.start(lambda: pytest.fail("Hydra's main is not for runs"))
    assert len(cells) == 2 * 3 * 2 * 3
    assert len({cell.digest for cell in cells}) == 3 * 2 * 3 + 1  # one unquantized reference
    assert {cell.execution.study for cell in cells} == {"tiny"}
    assert {cell.run.bits for cell in cells} == {2, 3, 4}
    assert {cell.run.group_size for cell in cells} == {None, 64}


def test_the_command_line_wins_over_an_experiment() -> None:
    cells = check(["experiment=tiny", "bits=3", "method=rtn,gptq", "study=mine"], multirun=True)
    assert {(cell.run.bits, cell.run.method.name, cell.execution.study) for cell in cells} == {
        (3, "rtn", "mine"),
        (3, "gptq", "mine"),
    }


def test_which_data_a_model_takes_without_further_words() -> None:
    (tiny,) = check([], multirun=False)
    assert tiny.run.calibration is not None
    assert tiny.run.calibration.name == "stdlib"
    assert list(tiny.run.evaluation.texts) == ["stdlib_docs", "stdlib_source"]
    (hub,) = check(["model=opt-13b"], multirun=False)
    assert hub.run.calibration is not None
    assert hub.run.calibration.name == "c4"
    assert list(hub.run.evaluation.texts) == ["wikitext2", "c4", "ptb"]
    (chosen,) = check(["calibration=wikitext2", "evaluation=ptb"], multirun=False)
    assert chosen.run.calibration is not None
    assert (chosen.run.calibration.name, list(chosen.run.evaluation.texts)) == ("wikitext2", ["ptb"])


def test_the_main_job_is_quantease_at_3_bits_per_channel() -> None:
    (settings,) = check([], multirun=False)
    assert (settings.run.method.name, settings.run.bits, settings.run.group_size, settings.run.model.name) == (
        "quantease",
        3,
        None,
        "tiny",
    )


def test_the_digest_names_what_changes_a_number_and_nothing_else() -> None:
    def digest(*overrides: str) -> str:
        return check(list(overrides), multirun=False)[0].digest

    same = ["study=other", "tracker=none", "force=true", "batch_size=2", "device=cpu", "results=elsewhere"]
    assert {digest(change) for change in same} == {digest()}
    changes = [
        "bits=4",
        "group_size=64",
        "symmetric=true",
        "act_order=true",
        "seed=1",
        "method=rtn",
        "method.num_iters=9",
    ]
    changes += ["calibration=c4", "calibration.num_sequences=64", "evaluation=stdlib_docs", "model.sequence_length=128"]
    digests = [digest(), *(digest(change) for change in changes)]
    assert len(set(digests)) == len(digests)


def test_results_are_kept_in_the_project_whatever_the_current_folder_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def folders(*overrides: str) -> tuple[Path, str | None]:
        (cell,) = check(["study=night", *overrides], multirun=False)
        return cell.study_folder, cell.execution.cache

    monkeypatch.chdir(PROJECT)
    assert folders() == (Path("results/night"), "results/cache")  # short, as configurations and tables have it
    monkeypatch.chdir(tmp_path)
    assert folders() == (PROJECT / "results" / "night", str(PROJECT / "results" / "cache"))
    assert folders("results=here") == (Path("here/night"), "here/cache")  # of the current folder
    assert not list(tmp_path.iterdir())


def test_runs_of_a_series_differ_in_nothing_but_the_seed() -> None:
    def series(*overrides: str) -> str:
        return check(list(overrides), multirun=False)[0].series

    assert series("seed=1") == series() == series("seed=2", "device=cpu")
    assert len({series(), series("bits=4"), series("method.num_iters=9"), series("calibration.num_sequences=64")}) == 4
