"""Tables and figures of a study in results/.

python -m analysis [STUDY]                         prints the table of the study (tiny, unless you name one) and
                                                   regenerates all its tables and figures in results/STUDY/report/
python -m analysis [STUDY] COLUMN=VALUE ...        prints the table of the runs with that value, and the unquantized ones
python -m analysis report [STUDY] COLUMN=VALUE ... regenerates the report from these runs alone
python -m analysis compare RUN RUN                 the ratio of two runs' perplexities, with its paired bootstrap interval

STUDY is a folder, or its name in results/; RUN is a run's folder, or its name or digest if that is the only one in results/.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from analysis.collect import collect
from analysis.intervals import compare_runs
from analysis.report import write_report
from analysis.tables.comparison import comparison, markdown
from runners.arguments import start
from runners.results.metrics import Status, status_counts

RESULTS = Path("results")
Study = Annotated[str, "a study's folder, or its name in results/"]
Conditions = Annotated[str, "only the runs whose column NAME has the value, and the unquantized ones"]
Run = Annotated[str, "a run's folder, or its name or digest if only one run in results/ has it"]


def main(words: Sequence[str] | None = None) -> None:
    """Do what the command line asks; what is wrong with it, or with the results, ends the program with a sentence."""
    start(table, report, compare, words=words, wrong=(OSError, ValueError))


def table(study: Study = "tiny", /, **conditions: Conditions) -> None:
    """Print the table of a study. Without conditions, also regenerate its report: all tables and figures."""
    frame = collect(_folder(study), conditions)
    print(markdown(comparison(frame)))
    if set(frame["status"]) != {Status.DONE}:
        print(f"\nOf {len(frame)} runs: {status_counts(frame['status'])}. The table shows those that are done.")
    if not conditions:
        report(study)


def report(study: Study = "tiny", /, **conditions: Conditions) -> None:
    """Regenerate the tables and figures in a study's report/."""
    print(f"\nAll tables and figures: {write_report(_folder(study), conditions) / 'index.html'}")


def compare(first: Run, second: Run, /) -> None:
    """Print the ratio of two runs' perplexities on each text, with its paired bootstrap interval over the windows."""
    one, other = _run(first), _run(second)
    for text, ratio in compare_runs(one, other).items():
        print(f"{text}: perplexity of {one.name} over that of {other.name} = {ratio} (95 % over the windows)")


def _folder(study: str) -> Path:
    return Path(study) if Path(study).is_dir() else RESULTS / study


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
    main()
