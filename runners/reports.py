"""`python -m runners.reports study=tiny entity=NAME [project=quantease-bench] [results=results]`: a study on W&B's pages.

Saves a workspace, the page on which the runs of a study are compared, and a report to write the findings into. Both show
what `runners.tracking` has logged, for the texts that the study in `results/` has. Needs the extra `reports`.
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import wandb

from runners.arguments import named_values
from runners.console import console
from runners.errors import InputError
from runners.results.run_folder import METRICS
from runners.tracking import content
from runners.tracking.weights_and_biases import logged_in

DEFAULTS = {"study": "tiny", "entity": "", "project": "quantease-bench", "results": "results"}
MAX_RUNS = 100  # in a panel
COLUMNS = ("bits_per_weight", "layers/mean_relative_error", "quantize/seconds", content.CHECKPOINT, "status", "error")


def metric_names(study: Path) -> list[str]:
    """The names of all that the runs of a study have measured.

    Raises:
        InputError: there are no runs.
    """
    names = {name for file in study.glob(f"*/*/{METRICS}") for name in json.loads(file.read_text(encoding="utf-8"))}
    if not names:
        raise InputError(f"{study} has no runs: set study=NAME, and results=FOLDER if it lies elsewhere")
    return sorted(names)


def sections(names: list[str]) -> dict[str, list[Any]]:
    """The panels, by the heading they stand under. `names`: what the runs have measured."""
    perplexities = [name for name in names if name.startswith("ppl/")]
    agreement = [name for name in names if name.startswith("agreement/") and name.endswith("/kl")]
    accuracies = [
        name for name in names if name.startswith("zero_shot/") and name.split("/")[-1] in ("acc", "acc_norm")
    ]
    costs = [name for name in ("quantize/seconds", "quantize/peak_memory_gb", "evaluate/seconds") if name in names]
    warnings = [name for name in names if name.startswith("warnings/")]
    panels = {
        "Perplexity": [_bars(name) for name in perplexities + agreement + accuracies],
        "Size against perplexity": [_against_size(name) for name in perplexities],
        "Layer error": _layer_error(names),
        "Time and memory": [_bars(name) for name in costs],
        "Warnings": [_bars(name) for name in warnings],
    }
    return {heading: shown for heading, shown in panels.items() if shown}


def _bars(name: str) -> Any:
    """A bar for each setting: the mean over its runs, which differ in their seeds, and their standard deviation."""
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
    import wandb_workspaces.reports.v2 as wr

    x, y = wr.SummaryMetric("bits_per_weight"), wr.SummaryMetric(name)
    return wr.ScatterPlot(title=f"{name} against bits per weight", x=x, y=y, log_y=True)


def _layer_error(names: list[str]) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    curves = ["relative_error", "held_out_error"] if "layers/mean_held_out_error" in names else ["relative_error"]
    by_layer = [
        wr.LinePlot(
            title=curve, x=content.LAYER_INDEX, y=[content.LAYER + curve], log_y=True, max_runs_to_show=MAX_RUNS
        )
        for curve in curves
    ]
    by_block = wr.LinePlot(title="by block", x=content.BLOCK, metric_regex=f"^{content.ERROR}.*", log_y=True)
    sweeps = wr.LinePlot(title="over the sweeps", x=content.SWEEP, y=[content.CONVERGENCE], max_runs_to_show=MAX_RUNS)
    figures = wr.MediaBrowser(title="figures", media_keys=[content.LAYER_ERROR_FIGURE], num_columns=2)
    return [*by_layer, by_block, sweeps, figures]


def workspace(study: str, entity: str, project: str, names: list[str]) -> Any:
    """The page on which the runs of a study are compared."""
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces import expr

    perplexities = [name for name in names if name.startswith("ppl/")]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"Study {study}",
        sections=[ws.Section(name=name, panels=panels, is_open=True) for name, panels in sections(names).items()],
        settings=ws.WorkspaceSettings(max_runs=MAX_RUNS),
        runset_settings=ws.RunsetSettings(
            filters=expr.And(expr.Metric("Group") == study),
            order=[expr.Ordering(expr.Metric("Name"), ascending=True)],
            pinned_columns=["run:displayName", "run:state", *(f"summary:{name}" for name in [*perplexities, *COLUMNS])],
        ),
    )


def report(study: str, entity: str, project: str, names: list[str]) -> Any:
    """The template of a report: what the study has measured, with room for what it says, and what has failed."""
    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces.reports.v2.interface import Report, Runset

    columns = [f"summary:{name}" for name in names if name.startswith("ppl/")] + [f"summary:{name}" for name in COLUMNS]
    everything = f"Metric('Group') = '{study}'"
    blocks: list[Any] = [
        wr.P("Question: what was compared, and why. Replace this paragraph, and those under the headings."),
        wr.TableOfContents(),
    ]
    for heading, panels in sections(names).items():
        runs = Runset(entity, project, name=study, filters=everything, visible_columns=columns)
        blocks += [wr.H2(heading), wr.P("Finding:"), wr.PanelGrid(runsets=[runs], panels=panels)]
    failed = f"{everything} and Metric('State') != 'finished'"
    runs = Runset(entity, project, name="failed", filters=failed, visible_columns=["summary:stage", "summary:error"])
    blocks += [wr.H2("Failures"), wr.P("Every run that did not end well, with its stage and error.")]
    blocks += [wr.PanelGrid(runsets=[runs]), wr.H2("How it was made"), wr.P(_how(study))]
    return Report(project, entity, title=f"Study {study}", blocks=blocks, width="fluid")


def _how(study: str) -> str:
    return (
        f"The runs are the group {study}; each holds its configuration, its tables of layers and windows, and the hashes of "
        "its texts and calibration tokens. Bars are means over seeds with standard deviations."
    )


def main(arguments: list[str]) -> None:
    """Save both, and say where they are."""
    options = named_values(arguments, DEFAULTS)
    if find_spec("wandb_workspaces") is None:
        raise InputError('reports need a package that is not installed: pip install "quantease-bench[reports]"')
    if not options["entity"]:
        raise InputError("entity is missing: entity=NAME, the user or team of W&B that owns the project")
    names = metric_names(Path(options["results"]) / options["study"])
    if not logged_in():
        raise InputError("W&B does not know who you are: run wandb login, or set WANDB_API_KEY")
    where = (options["study"], options["entity"], options["project"])
    try:
        for page in (workspace(*where, names), report(*where, names)):
            console.print(page.save().url, highlight=False, soft_wrap=True)
    except (ValueError, wandb.Error) as error:  # no such project, no right to write to it, no answer
        raise InputError(f"W&B has not saved the pages of study {options['study']}: {error}") from error


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
