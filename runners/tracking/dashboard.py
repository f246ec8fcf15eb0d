"""trackio: a dashboard in the browser without an account; every study is a project of one local store, `results/trackio/`.

Only the store is written, and no server is asked: not even for the user's name, as `trackio.init` does.
"""

import io
from contextlib import redirect_stdout, suppress
from pathlib import Path
from shlex import quote
from typing import Any

from runners.config.settings import Settings
from runners.results.layers import LayerRecord
from runners.results.metrics import keys_of
from runners.tracking import content
from runners.tracking.figures import layer_error_figure, pixels
from runners.tracking.store import open_store, project_of, store_of


class TrackioTracker:
    """One run in trackio's store."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        store = store_of(Path(settings.execution.results))
        open_store(store)
        self._folder = folder
        self._curves = content.Curves()
        self.where: str | None = (
            f"TRACKIO_DIR={quote(str(store))} trackio show --project {project_of(settings.execution.study)}"
        )
        self._run = _start(settings)

    def layer(self, record: LayerRecord) -> None:
        """Log one point per curve."""
        self._run.log(self._curves.points(record), step=record.block)

    def finish(self, metrics: dict[str, Any], records: list[LayerRecord]) -> None:
        """Log the numbers of `metrics.json`, its texts as a table, the run's tables, and its figure."""
        import trackio

        # Settings are in trackio's table of runs; as metrics each would become a chart.
        shown = content.perplexities(metrics)
        left = set(metrics) - set(self._run.config) - set(keys_of(metrics, "ppl"))
        numbers = {content.REST + key: metrics[key] for key in left if isinstance(metrics[key], int | float)}
        words = [[key, value] for key, value in metrics.items() if isinstance(value, str)]
        tables = content.tables(self._folder, metrics["status"], records)
        if "sweeps" in tables:
            for sweep, error in content.convergence(tables["sweeps"]).items():
                self._run.log({content.SWEEP: sweep, content.CONVERGENCE: error})
        media: dict[str, Any] = {
            f"tables/{name}": trackio.Table(list(table), table.to_numpy().tolist()) for name, table in tables.items()
        }
        media["tables/labels"] = trackio.Table(["name", "value"], words)
        if any(record.relative_error is not None for record in records):
            media[content.LAYER_ERROR_FIGURE] = trackio.Image(pixels(layer_error_figure(records)))
        self._run.log(shown | numbers | media)

    def close(self) -> None:
        """Write what is still in memory."""
        with redirect_stdout(io.StringIO()):
            self._run.finish()


def _start(settings: Settings) -> Any:
    import trackio
    from trackio.run import Run

    class LocalRun(Run):
        """`trackio.init` without its messages, and without asking the model hub who the user is."""

        def _get_username(self) -> None:
            return None

    name, project = content.title(settings), project_of(settings.execution.study)
    with suppress(ValueError):  # the study has no run yet
        for earlier in [run for run in trackio.Api().runs(project) if run.name == name]:
            earlier.delete()  # the run is made again, and replaces it
    return LocalRun(None, project, None, name, group=settings.run.model.name, config=content.config(settings))
