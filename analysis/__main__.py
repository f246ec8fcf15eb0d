"""Tables and figures of a study in results/.

python -m analysis [STUDY]                         prints the table of the study (tiny, unless you name one) and
                                                   regenerates all its tables and figures in results/STUDY/report/
python -m analysis [STUDY] COLUMN=VALUE ...        prints the table of the runs with that value, and the unquantized ones
python -m analysis report [STUDY] COLUMN=VALUE ... regenerates the report from these runs alone
python -m analysis compare RUN RUN                 the ratio of two runs' perplexities, with its paired bootstrap interval

STUDY is a folder, or its name in results/; RUN is a run's folder, or its name or digest if that is the only one in results/.
"""

import sys
from pathlib import Path

from analysis.collect import collect
from analysis.intervals import compare_runs
from analysis.report import write_report
from analysis.tables.comparison import comparison, markdown
from runners.results.metrics import Status, status_counts

RESULTS = Path("results")


def main(arguments: list[str]) -> None:
    """Do what the command line asks; what is wrong with it ends the program with a sentence."""
    try:
        if {"-h", "--help"} & set(arguments):
            print(__doc__)
        elif arguments[:1] == ["compare"]:
            _compare(arguments[1:])
        else:
            _study(arguments)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None


def _study(arguments: list[str]) -> None:
    """Print the table of one study, write its report, or both."""
    only_report = arguments[:1] == ["report"]
    words = arguments[only_report:]
    conditions = {name: value for name, _, value in (word.partition("=") for word in words if "=" in word)}
    studies = [word for word in words if "=" not in word] or ["tiny"]
    if len(studies) > 1:
        raise ValueError(f"one study at a time, not {', '.join(studies)}")
    folder = Path(studies[0]) if Path(studies[0]).is_dir() else RESULTS / studies[0]
    if not only_report:
        frame = collect(folder, conditions)
        print(markdown(comparison(frame)))
        if set(frame["status"]) != {Status.DONE}:
            print(f"\nOf {len(frame)} runs: {status_counts(frame['status'])}. The table shows those that are done.")
    if only_report or not conditions:
        print(f"\nAll tables and figures: {write_report(folder, conditions) / 'index.html'}")


def _compare(words: list[str]) -> None:
    if len(words) != 2:
        raise ValueError("compare takes two runs: python -m analysis compare RUN RUN")
    first, second = map(_run, words)
    for text, ratio in compare_runs(first, second).items():
        print(f"{text}: perplexity of {first.name} over that of {second.name} = {ratio} (95 % over the windows)")


def _run(word: str) -> Path:
    """A run's folder, by its path or its digest."""
    if Path(word).is_dir():
        return Path(word)
    found = [folder for folder in sorted(RESULTS.glob("*/*/*-*")) if word in (folder.name, folder.name.split("-")[-1])]
    if len(found) != 1:
        what = f"the name of {len(found)} runs: {', '.join(map(str, found))}" if found else "no run in results/"
        raise ValueError(f"{word} is {what}. Name a run's folder")
    return found[0]


if __name__ == "__main__":
    main(sys.argv[1:])
