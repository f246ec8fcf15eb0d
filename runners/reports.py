"""`python -m runners.reports study=tiny entity=NAME`: pages on W&B for a study.

Saves a workspace, the page on which the runs of a study are compared, and a report to write the findings into. Both show
what `runners.tracking` has logged, for the texts and tasks that the runs in `results/` were measured on. Needs the extra
`reports`.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import wandb

from runners.arguments import start
from runners.console import console
from runners.errors import InputError
from runners.project import results_folder
from runners.results import metrics
from runners.results.studies import chosen_study
from runners.tracking import content
from runners.tracking.wandb_server import logged_in

MAX_RUNS = 100  # per panel; W&B's own default of 10 would hide most cells of a study
COLUMNS = (
    metrics.BITS_PER_WEIGHT,
    metrics.RELATIVE_ERROR,
    metrics.QUANTIZE_SECONDS,
    metrics.CHECKPOINT_SHA256,
    "status",
    "error",
)


def main(
    entity: Annotated[str, "the user or team of W&B that owns the project"],
    study: Annotated[str | None, "name of the study (default: the one that was run last)"] = None,
    project: Annotated[str, "project of W&B"] = "quantease-bench",
    results: Annotated[Path | None, "folder of all studies (default: results/ of the project)"] = None,
) -> None:
    """Save two pages for a study on W&B, a workspace and the template of a report, and print their addresses."""
    if find_spec("wandb_workspaces") is None:
        raise InputError('reports need a package that is not installed: pip install -e ".[reports]"')
    results = results or results_folder()
    study = chosen_study(study, results)
    names = metric_names(results / study)
    if not logged_in():
        raise InputError("W&B does not know who you are: run wandb login, or set WANDB_API_KEY")
    try:
        for page in (workspace(study, entity, project, names), report(study, entity, project, names)):
            console.print(page.save().url, highlight=False, soft_wrap=True)
    except (ValueError, wandb.Error) as error:  # no such project, no right to write to it, no answer
        raise InputError(f"W&B has not saved the pages of study {study}: {error}") from error


def metric_names(study: Path) -> list[str]:
    """The keys of everything that at least one run of a study has measured, sorted.

    Raises:
        InputError: there are no runs.
    """
    files = study.glob(f"*/*/{metrics.METRICS}")
    names = {name for file in files for name in json.loads(file.read_text(encoding="utf-8"))}
    if not names:
        raise InputError(f"{study.absolute()} has no runs: set study=NAME, and results=PATH if it is elsewhere")
    return sorted(names)


def sections(names: list[str]) -> dict[str, list[Any]]:
    """The panels that both pages show, by their heading.

    Args:
        names: the keys of what the runs have measured; a heading without any is left out.
    """
    perplexities = _perplexities(names)
    agreement = [name for name in metrics.keys_of(names, "agreement") if name.endswith("/kl")]
    accuracies = [
        name for name in names if (parts := metrics.zero_shot_parts(name)) and parts[1] in ("acc", "acc_norm")
    ]
    costs = [metrics.QUANTIZE_SECONDS, metrics.QUANTIZE_MEMORY, metrics.EVALUATE_SECONDS]
    warnings = metrics.keys_of(names, "warnings")
    panels = {
        "Perplexity": [_bars(name) for name in perplexities + agreement + accuracies],
        "Size against perplexity": [_against_size(name) for name in perplexities],
        "Layer error": _layer_error(names),
        "Time and memory": [_bars(name) for name in costs if name in names],
        "Warnings": [_bars(name) for name in warnings],
    }
    return {heading: shown for heading, shown in panels.items() if shown}


def _perplexities(names: list[str]) -> list[str]:
    return [metrics.ppl(text) for text in metrics.names(names, "ppl")]


def _bars(name: str) -> Any:
    """One bar per setting: the mean of its runs, which differ only in their seeds, with their standard deviation."""
    import wandb_workspaces.reports.v2 as wr

    return wr.BarPlot(
        title=name,
        metrics=[wr.SummaryMetric(name)],
        groupby=wr.Config(content.SETTING),
        groupby_aggfunc="mean",
        groupby_rangefunc="stddev",
        max_runs_to_show=MAX_RUNS,
        max_bars_to_show=MAX_RUNS,
    )


def _against_size(name: str) -> Any:
    """One point per run: bits per weight on x, the metric on a logarithmic y."""
    import wandb_workspaces.reports.v2 as wr

    x, y = wr.SummaryMetric(metrics.BITS_PER_WEIGHT), wr.SummaryMetric(name)
    return wr.ScatterPlot(title=f"{name} against bits per weight", x=x, y=y, log_y=True)


def _layer_error(names: list[str]) -> list[Any]:
    """Relative errors by decoder block and by sweep, and the figures that the runs have logged."""
    import wandb_workspaces.reports.v2 as wr

    curves = {"relative error by block": content.LAYER_ERROR, "the same, held out": content.HELD_OUT}
    if metrics.HELD_OUT_ERROR not in names:
        del curves["the same, held out"]
    by_block = [
        wr.LinePlot(title=title, x="Step", metric_regex=f"^{curve}.*", log_y=True, max_runs_to_show=MAX_RUNS)
        for title, curve in curves.items()
    ]
    sweeps = wr.LinePlot(title="over the sweeps", x=content.SWEEP, y=[content.CONVERGENCE], max_runs_to_show=MAX_RUNS)
    figures = wr.MediaBrowser(title="figures", media_keys=[content.LAYER_ERROR_FIGURE], num_columns=2)
    return [*by_block, sweeps, figures]


def workspace(study: str, entity: str, project: str, names: list[str]) -> Any:
    """The page on which the runs of a study are compared, not saved yet.

    Args:
        names: the keys of what the runs have measured.
    """
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces import expr

    columns = ["run:displayName", "run:state", *(f"summary:{name}" for name in [*_perplexities(names), *COLUMNS])]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"Study {study}",
        sections=[ws.Section(name=name, panels=panels, is_open=True) for name, panels in sections(names).items()],
        settings=ws.WorkspaceSettings(max_runs=MAX_RUNS),
        runset_settings=ws.RunsetSettings(
            filters=expr.And(expr.Metric("Group") == study),
            order=[expr.Ordering(expr.Metric("Name"), ascending=True)],
            pinned_columns=columns,
        ),
    )


def report(study: str, entity: str, project: str, names: list[str]) -> Any:
    """The template of a report, not saved yet: what was measured, with room for the findings, and what has failed.

    Args:
        names: the keys of what the runs have measured.
    """
    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces.reports.v2.interface import Report, Runset

    columns = [f"summary:{name}" for name in [*_perplexities(names), *COLUMNS]]
    everything = f"Metric('Group') = '{study}'"
    blocks: list[Any] = [
        wr.P("Question: what was compared, and why. Replace this paragraph, and those under the headings."),
        wr.TableOfContents(),
    ]
    for heading, panels in sections(names).items():
        runs = Runset(entity, project, name=study, filters=everything, visible_columns=columns)
        blocks += [wr.H2(heading), wr.P("Finding:"), wr.PanelGrid(runsets=[runs], panels=panels)]
    failed = f"{everything} and Metric('State') != 'finished'"
    runs = Runset(
        entity,
        project,
        name=metrics.Status.FAILED.value,
        filters=failed,
        visible_columns=["summary:stage", "summary:error"],
    )
    blocks += [wr.H2("Failures"), wr.P("Every run that has failed, with its stage and error.")]
    blocks += [wr.PanelGrid(runsets=[runs]), wr.H2("How it was made"), wr.P(_how(study))]
    return Report(project, entity, title=f"Study {study}", blocks=blocks, width="fluid")


def _how(study: str) -> str:
    return (
        f"The runs are the group {study}; each holds its configuration, its tables of layers and windows, and the hashes of "
        "its texts and calibration tokens. Bars are means over seeds with standard deviations."
    )


if __name__ == "__main__":
    start(main)
