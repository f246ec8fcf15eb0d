"""Every table and figure of a study, written to `<study>/report/`, and one page that shows them together.

The same runs give the same bytes: nothing in the files says when they were made.
"""

import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.collect import collect, environment, home
from analysis.correlation import correlations, run_errors
from analysis.figures.drawings import draw
from analysis.figures.interactive import interactive_pareto
from analysis.figures.pareto import pareto_file
from analysis.figures.style import png
from analysis.intervals import LOWEST_NOTE, Pair, compare_peers, pairs_table, ratios_to_lowest, window_losses, winners
from analysis.published import PUBLISHED, published_numbers
from analysis.series import Row, summarize
from analysis.tables import papers
from analysis.tables.comparison import comparison_of, markdown, markdown_lines
from analysis.tables.correlations import correlation_latex, correlation_markdown, correlation_words
from analysis.tables.latex import latex
from analysis.tables.page import Report, page
from analysis.tables.summary import summary_sentences
from runners.results import metrics
from runners.results.metrics import Status, grid_words

LONGEST_NAME = 100  # of the part of a folder's name that tells conditions
MADE = (".md", ".tex", ".csv", ".png", ".html")  # the kinds of files that the folder holds; older ones are removed


def write_report(
    study: Path | Sequence[Path], conditions: Mapping[str, str] | None = None, numbers: Path = PUBLISHED
) -> Path:
    """Make the report of a study anew and return its folder. Under conditions it has a folder of its own.

    Args:
        study: the study's folder; of several studies, their folders.
        conditions: which runs (see `analysis.collect.collect`); the page names them.
        numbers: the folder of published numbers.

    Raises:
        FileNotFoundError, ValueError: there are no runs, or no table may mix them (see `collect`).
    """
    studies = [study] if isinstance(study, Path) else list(study)
    frame = collect(studies, conditions)
    summary = summarize(frame)
    pairs = compare_peers(summary, window_losses(frame))
    bold, published = winners(pairs), published_numbers(numbers)
    runs = run_errors(frame, summary)
    correlated = correlations(runs)
    figures, left_out = draw(frame, summary, runs)
    report = Report(
        study=home(studies).resolve().name,
        sentences=summary_sentences(summary, pairs),
        conditions=dict(conditions or {}),
        comparison=comparison_of(summary, bold),
        papers=[papers.paper_table(summary, metric, bold, published) for metric in papers.table_metrics(summary)],
        intervals=ratios_to_lowest(summary, pairs),
        correlations=correlation_words(correlated),
        figures=figures,
        charts=_charts(summary),
        left_out=left_out,
        missing=_missing(frame),
        provenance=_provenance(frame),
    )
    folder = home(studies) / _folder_name(conditions or {})
    _write(folder, _files(report, pairs, correlated))
    return folder


def _folder_name(conditions: Mapping[str, str]) -> str:
    """`report`, or `report-bits=3,method=gptq+rtn`: the report on some runs must not replace that on all.

    What no file system would take is replaced, and the hash of the conditions keeps such names apart.
    """
    words = ",".join(f"{name}={'+'.join(sorted(conditions[name].split(',')))}" for name in sorted(conditions))
    safe = re.sub(r"[^\w.,=+-]", "_", words, flags=re.ASCII)
    if safe != words or len(safe) > LONGEST_NAME:
        safe = f"{safe[:LONGEST_NAME]}-{sha256(words.encode()).hexdigest()[:8]}"
    return f"report-{safe}" if safe else "report"


def _charts(summary: list[Row]) -> dict[str, list[dict[str, Any]]]:
    """For the file of every figure that the page shows in an interactive form too: one chart per text."""
    models = dict.fromkeys(row["model"] for row in summary)
    found = {pareto_file(model): list(interactive_pareto(summary, model).values()) for model in models}
    return {file: charts for file, charts in found.items() if charts}


def _files(report: Report, pairs: list[Pair], correlated: pd.DataFrame) -> dict[str, bytes]:
    """The content of every file of the folder, by name."""
    files = {"comparison.md": markdown(report.comparison)}
    files["intervals.md"] = "\n\n".join([markdown_lines(report.intervals), LOWEST_NOTE])
    files["intervals.csv"] = _csv(pairs_table(pairs), "%.4f")
    for table in report.papers:
        name = table.metric.slug
        files[f"{name}.md"] = f"{papers.markdown(table)}\n\nThe runs behind every number: `{name}.csv`."
        files[f"{name}.tex"] = latex(table)
        files[f"{name}.csv"] = _csv(pd.DataFrame(table.entries).drop(columns=["printed", "beside", "places"]), "%.6g")
    if len(correlated):
        files["correlation.md"] = correlation_markdown(report.correlations)
        files["correlation.tex"] = correlation_latex(report.correlations)
        files["correlation.csv"] = _csv(correlated.astype({"bits": "Int64"}), "%.4f")
    files["index.html"] = page(report)
    content = {name: (text.rstrip("\n") + "\n").encode() for name, text in files.items()}
    return content | {name: png(figure) for name, (_, figure) in report.figures.items()}


def _csv(table: pd.DataFrame, numbers: str) -> str:
    return table.to_csv(index=False, float_format=numbers, lineterminator="\n")


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """Write each file to a temporary name and rename it; then remove what an earlier report left.

    The page is written last, so that every file that it links to is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in sorted(files.items(), key=lambda entry: entry[0] == "index.html"):
        temporary = folder / f"{name}.partial"
        temporary.write_bytes(content)
        temporary.replace(folder / name)
    for old in folder.iterdir():
        if old.suffix in MADE and old.name not in files:
            old.unlink()


def _missing(frame: pd.DataFrame) -> pd.DataFrame:
    """What a reader might miss: every run that is not done, and every metric that was skipped, with the reason."""
    rows: list[Row] = []
    skipped: dict[tuple[str, str], list[str]] = {}
    for run in frame.to_dict("records"):
        if run["status"] != Status.DONE:
            rows.append(_not_done(run))
        for name in metrics.names(run, "skipped"):
            why = run[metrics.skipped(name)]
            if isinstance(why, str):  # other runs have a gap in this column
                skipped.setdefault((name, why), []).append(run["place"])
    for (name, why), folders in skipped.items():
        first = folders[0]
        rows.append({"what": f"skipped: {name}", "why": why, "runs": len(folders), "see": first})
    return pd.DataFrame(rows, columns=["model", "method", "bits", "grid", "seed", "what", "why", "runs", "see"])


def _not_done(run: Row) -> Row:
    why = ": ".join(run[name] for name in ("reason", "stage", "error") if isinstance(run.get(name), str))
    labels = {name: run.get(name) for name in ("model", "method", "bits", "seed")}
    return labels | {"grid": grid_words(run), "what": run["status"], "why": why, "runs": 1, "see": run["place"]}


def _provenance(frame: pd.DataFrame) -> pd.DataFrame:
    """Where the numbers were made: one row per combination of machine, commit and versions, with its number of runs."""
    rows = []
    for folder in frame["folder"]:
        known = environment(folder)
        versions = known.get("versions") or {}
        changed = " with uncommitted changes" if known.get("uncommitted_changes") else ""
        rows.append(
            {
                "device": known.get("device") or "unknown",
                "commit": f"{str(known.get('commit') or 'unknown')[:10]}{changed}",
                "python": known.get("python") or "",
                **{name: versions.get(name) or "" for name in ("torch", "transformers", "numpy", "triton")},
            }
        )
    return pd.DataFrame(rows).value_counts(sort=False).rename("runs").reset_index()
