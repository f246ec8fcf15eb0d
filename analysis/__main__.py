"""Tables and figures of a study in results/.

python -m analysis [STUDY ...]                         prints the table of the study (the one that was run last, unless you
                                                       name one) and regenerates all its tables and figures in
                                                       results/STUDY/report/; of several studies, in results/A+B/report/
python -m analysis [STUDY ...] COLUMN=VALUE ...        prints the table of the runs with that value, or with one of a,b,c,
                                                       and of the unquantized ones
python -m analysis report [STUDY ...] COLUMN=VALUE ... makes a report from these runs alone, in a folder of its own
python -m analysis compare RUN RUN                     the ratio of two runs' perplexities, with its interval

STUDY is a folder, or its name in results/; RUN is a run's folder, or its name or digest, or how one of them begins if only
one run in results/ fits.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from analysis.collect import collect
from analysis.intervals import compare_runs
from analysis.report import write_report
from analysis.tables.comparison import comparison, markdown
from runners.arguments import start
from runners.errors import InputError, known_names
from runners.project import results_folder
from runners.results.metrics import METRICS, Status, status_counts
from runners.results.studies import chosen_study

MOST_CANDIDATES = 8  # runs that a message names
Studies = Annotated[tuple[str, ...], "a study's folder, or its name in results/; several: one table of all their runs"]
Conditions = Annotated[str, "only the runs whose column NAME has the value, or one of a,b, and the unquantized ones"]
Run = Annotated[
    str, "a run's folder; or its name or digest, or how one of them begins, if only one run in results/ fits"
]


def main(words: Sequence[str] | None = None) -> None:
    """Do what the command line asks; what is wrong with it, or with the results, ends the program with a sentence."""
    start(table, report, compare, words=words, wrong=(OSError, ValueError))


def table(studies: Studies = (), /, **conditions: Conditions) -> None:
    """Print the table of a study, or of several. Without conditions, also regenerate its report: all tables and figures."""
    folders = _folders(studies)
    frame = collect(folders, conditions)
    print(markdown(comparison(frame)))
    if set(frame["status"]) != {Status.DONE}:
        print(f"\nOf {len(frame)} runs: {status_counts(frame['status'])}. The table shows those that are done.")
    if not conditions:
        _report(folders, conditions)


def report(studies: Studies = (), /, **conditions: Conditions) -> None:
    """Regenerate the tables and figures in a study's report/; of some runs only, in a folder that is named after them."""
    _report(_folders(studies), conditions)


def _report(folders: list[Path], conditions: dict[str, str]) -> None:
    print(f"\nAll tables and figures: {write_report(folders, conditions) / 'index.html'}")


def compare(first: Run, second: Run, /) -> None:
    """Print the ratio of two runs' perplexities on each text, with its paired bootstrap interval over the windows."""
    one, other = _run(first), _run(second)
    for text, ratio in compare_runs(one, other).items():
        print(f"{text}: perplexity of {one.name} over that of {other.name} = {ratio} (95 % over the windows)")


def _folders(studies: Sequence[str]) -> list[Path]:
    """The folders of studies; without a name, that of the study that was run last, which is said."""
    if not studies:
        results = results_folder()
        return [results / chosen_study(None, results)]
    found = [_folder(word) for word in studies]
    return list({folder.resolve(): folder for folder in found}.values())


def _folder(word: str) -> Path:
    if Path(word).is_dir():
        return Path(word)
    results = results_folder()
    if (results / word).is_dir():
        return results / word
    there = sorted(folder.name for folder in results.glob("*/"))
    raise InputError(f"there is no study {word} in {results.absolute()}: {known_names(word, there)}")


def _run(word: str) -> Path:
    """A run's folder, by its path, or by its name or digest or the beginning of one of them."""
    if word and Path(word).is_dir():
        return Path(word)
    results = results_folder()
    folders = [file.parent for file in sorted(results.glob(f"*/*/*/{METRICS}"))]
    names = {folder: (folder.name, folder.name.split("-")[-1]) for folder in folders}
    found = [folder for folder in folders if word in names[folder]]
    found = found or [folder for folder in folders if word and any(name.startswith(word) for name in names[folder])]
    if len(found) == 1:
        return found[0]
    if not found:
        raise InputError(
            f"{word} is no run in {results.absolute()}: name a run's folder, or how its name or digest begins"
        )
    shown = ", ".join(map(str, found[:MOST_CANDIDATES])) + ", ..." * (len(found) > MOST_CANDIDATES)
    raise InputError(f"{word} fits {len(found)} runs: {shown}. Name more of it, or a run's folder")


if __name__ == "__main__":
    main()
