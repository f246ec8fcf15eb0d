"""How a run ends on disk. The order is what makes a kill at any moment harmless.

The metrics are written first, then the finished blocks are deleted, which a run without metrics would continue from, and at
last the progress, the trace of an unrecorded death.
"""

from typing import Any

from runners.config.settings import Settings
from runners.quantization.finished_blocks import delete_finished_blocks
from runners.results.metrics import Status, tasks_without_memory
from runners.results.progress import Progress, read_progress, remove_progress
from runners.results.run_folder import RunFolder
from runners.run.kept_codes import keep

CLEARING = "clear"  # the stage in which the metrics are written and the finished blocks deleted


def end_run(settings: Settings, folder: RunFolder, metrics: dict[str, Any], progress: Progress) -> None:
    """Write the metrics of a run, and delete its finished blocks if it is done, unless they are to be kept.

    Those that a zero-shot task still needs stay, and make no room for others.
    """
    is_to_be_cleared = metrics["status"] == Status.DONE and not tasks_without_memory(metrics) and not keep(settings)
    if is_to_be_cleared:
        progress.stage = CLEARING
    folder.write_metrics(metrics)
    if is_to_be_cleared:
        delete_finished_blocks(folder.path)
    remove_progress(folder.path)


def clear_leftovers(folder: RunFolder) -> None:
    """Finish what a kill has cut off after the metrics were written."""
    if read_progress(folder.path) is None:
        return
    with folder.lock(wait=False) as is_mine:
        progress = read_progress(folder.path)
        if is_mine and progress is not None and folder.metrics() is not None:
            if progress["stage"] == CLEARING:  # else they are to be kept
                delete_finished_blocks(folder.path)
            remove_progress(folder.path)
