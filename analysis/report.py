"""Every table and figure of a study, written to `<study>/report/`, and one page that shows them together.

The same runs give the same files: nothing in them says when they were made.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from analysis.collect import collect, environment, rows_of
from analysis.figures import model_figures
from analysis.figures.layer_figures import layer_errors, sweep_errors
from analysis.figures.model_figures import LeftOut
from analysis.figures.style import png
from analysis.intervals import LOWEST_NOTE, Pair, against_lowest, losses, pairs, tabulate, winners
from analysis.published import FOLDER, published
from analysis.series import Row, grid_words, summarize
from analysis.tables import papers
from analysis.tables.comparison import lines, markdown, table_of
from analysis.tables.latex import latex
from analysis.tables.page import page
from analysis.tables.papers import Paper

MADE = (".md", ".tex", ".csv", ".png", ".html")  # what the folder holds; older ones are removed


@dataclass
class Report:
    """What a report shows."""

    study: str
    conditions: dict[str, str]
    comparison: pd.DataFrame
    papers: list[Paper]
    intervals: pd.DataFrame
    figures: dict[str, tuple[str, Figure]] = field(default_factory=dict)  # of each file: its caption, the figure
    left_out: list[str] = field(default_factory=list)
    missing: pd.DataFrame = field(default_factory=pd.DataFrame)  # runs that are not done, metrics that were skipped
    provenance: pd.DataFrame = field(default_factory=pd.DataFrame)


def write_report(study: Path, conditions: Mapping[str, str] | None = None, numbers: Path = FOLDER) -> Path:
    """Regenerate the report of a study; its folder.

    Args:
        study: the study's folder.
        conditions: which runs (see `analysis.collect.collect`); the page says so.
        numbers: the folder of published numbers.

    Raises:
        FileNotFoundError, ValueError: there are no runs, or they cannot stand in one table (see `collect`).
    """
    frame = collect(study, conditions)
    summary, all_losses = summarize(frame), losses(frame)
    between = pairs(summary, all_losses)
    bold, theirs = winners(between), published(numbers)
    report = Report(
        study.resolve().name,
        dict(conditions or {}),
        table_of(summary, bold),
        [papers.paper(summary, metric, bold, theirs) for metric in papers.metrics(summary)],
        against_lowest(summary, between),
        missing=_missing(frame),
        provenance=_provenance(frame),
    )
    for file, caption, draw in _drawings(frame, summary):
        try:
            report.figures[file] = (caption, draw())
        except LeftOut as reason:
            report.left_out.append(f"{caption}: {reason}")
    _write(study / "report", _files(report, between))
    return study / "report"


def _drawings(frame: pd.DataFrame, summary: list[Row]) -> Iterator[tuple[str, str, Callable[[], Figure]]]:
    """Every figure: its file, its caption, and how to draw it."""
    layers, sweeps = rows_of(frame, "layers.csv"), rows_of(frame, "sweeps.csv")
    partial = functools.partial
    bits_title = "Perplexity against bits per weight (mean and standard deviation over seeds)"
    models = list(dict.fromkeys(row["model"] for row in summary))
    for model in models:
        yield f"pareto-{model}.png", f"{bits_title}, {model}", partial(model_figures.pareto, summary, model)
    yield "size.png", "Perplexity against model size", partial(model_figures.against_size, summary)
    for model in models:
        errors = partial(layer_errors, summary, layers, model)
        yield f"layers-{model}.png", f"Relative error by layer (mean over seeds), {model}", errors
        errors = partial(sweep_errors, summary, sweeps, model)
        yield f"sweeps-{model}.png", f"Relative error by sweep (mean over layers and seeds), {model}", errors
    yield "zero_shot.png", "Zero-shot accuracy against model size", partial(model_figures.zero_shot, summary)
    yield "seconds.png", "Time to quantize against model size", partial(model_figures.seconds, summary)


def _files(report: Report, between: list[Pair]) -> dict[str, bytes]:
    """The content of every file of the folder."""
    files = {"comparison.md": markdown(report.comparison)}
    files["intervals.md"] = "\n\n".join([lines(report.intervals), LOWEST_NOTE])
    files["intervals.csv"] = tabulate(between).to_csv(index=False, float_format="%.4f", lineterminator="\n")
    for table in report.papers:
        name = table.metric.slug
        files[f"{name}.md"] = f"{papers.markdown(table)}\n\nThe runs of every cell: `{name}.csv`."
        files[f"{name}.tex"] = latex(table)
        cells = pd.DataFrame(table.cells).drop(columns=["printed", "beside"])
        files[f"{name}.csv"] = cells.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    files["index.html"] = page(report)
    content = {name: (text.rstrip("\n") + "\n").encode() for name, text in files.items()}
    return content | {name: png(figure) for name, (_, figure) in report.figures.items()}


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """Write each file to a temporary name and rename it; then remove what an earlier report left."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in sorted(
        files.items(), key=lambda entry: entry[0] == "index.html"
    ):  # what it shows is there first
        partial = folder / f"{name}.partial"
        partial.write_bytes(content)
        partial.replace(folder / name)
    for old in folder.iterdir():
        if old.suffix in MADE and old.name not in files:
            old.unlink()


def _missing(frame: pd.DataFrame) -> pd.DataFrame:
    """What a reader might look for and not find: every run that failed or cannot be, and metrics that were skipped."""
    rows: list[Row] = []
    skipped: dict[tuple[str, str], list[str]] = {}
    for run in frame.to_dict("records"):
        if run["status"] != "done":
            said = [run[name] for name in ("reason", "stage", "error") if isinstance(run.get(name), str)]
            where = {name: run.get(name) for name in ("model", "method", "bits", "seed")} | {"grid": grid_words(run)}
            rows.append(where | {"what": run["status"], "why": ": ".join(said), "runs": 1, "folder": run["folder"]})
        for name, why in run.items():
            if str(name).startswith("skipped/") and isinstance(why, str):
                skipped.setdefault((str(name), why), []).append(run["folder"])
    for (name, why), folders in skipped.items():
        rows.append({"what": name.replace("/", ": ", 1), "why": why, "runs": len(folders), "folder": folders[0]})
    return pd.DataFrame(rows, columns=["model", "method", "bits", "grid", "seed", "what", "why", "runs", "folder"])


def _provenance(frame: pd.DataFrame) -> pd.DataFrame:
    """On what the runs ran: a row a combination of machine, commit and versions, and how many runs that were."""
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
    table = pd.DataFrame(rows)
    return table.value_counts(sort=False).rename("runs").reset_index()
