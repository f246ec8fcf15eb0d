"""`python -m runners.sync study=tiny`: send the offline runs of a study to W&B.

Each run is sent once: W&B leaves a `.synced` file in its folder. Runs that have not ended are left out, as are those of
which nothing was recorded, and of several executions of the same cell all but the latest. Send a study from where it was
made: W&B remembers the full paths of the tables that it has staged.
"""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

from runners.arguments import start
from runners.console import console
from runners.errors import InputError
from runners.project import results_folder
from runners.results.metrics import METRICS
from runners.results.studies import chosen_study
from runners.tracking.content import run_id, without_attempt
from runners.tracking.wandb_server import OFFLINE, logged_in
from runners.tracking.weights_and_biases import data_folder

WANDB = [sys.executable, "-m", "wandb"]
HEADER = 7  # bytes at the start of a .wandb file: all that a process leaves which is killed at once
PARALLEL_UPLOADS = 4  # runs of a study are small: an upload mostly waits for the server


def main(
    study: Annotated[str | None, "name of the study (default: the one that was run last)"] = None,
    results: Annotated[Path | None, "folder of all studies (default: results/ of the project)"] = None,
    dry_run: Annotated[bool, "only list the runs that would be sent"] = False,
) -> None:
    """Send the offline runs of a study to W&B: those that have ended and were not sent before.

    The same command again sends only what is still missing.
    """
    results = results or results_folder()
    study = chosen_study(study, results)
    folders, left_out = pending(results / study)
    remarks = "".join(f", {count} {reason}" for reason, count in left_out.items())
    if dry_run:
        for folder in folders:
            console.print(str(folder), highlight=False, soft_wrap=True)
        console.print(f"{len(folders)} runs would be sent{remarks}")
        return
    failed = send(results / study, folders) if folders else []
    for folder in failed:
        console.print(f"not sent: {folder}", highlight=False, soft_wrap=True)
    console.print(f"{len(folders) - len(failed)} of {len(folders)} runs sent{remarks}")
    if failed:
        raise SystemExit(f"error: {len(failed)} runs were not sent; the same command again tries only those")


def pending(study: Path) -> tuple[list[Path], Counter[str]]:
    """The offline runs that are to be sent, in the order of their start; and how many are left out, by the reason.

    Raises:
        InputError: there is no such study, or it has no offline runs.
    """
    if not study.is_dir():
        raise InputError(
            f"{study.absolute()} is not the folder of a study: set study=NAME, and results=PATH if it is elsewhere"
        )
    folders = sorted((study / "wandb").glob("offline-run-*"))  # their names start with the time
    if not folders:
        raise InputError(
            f"{(study / 'wandb').absolute()} has no offline runs: they are made with tracker=wandb without being logged in"
        )
    latest = {_id(folder): folder for folder in folders if not is_empty(folder)}
    ended = {run_id(file.parent.name, study.name) for file in study.glob(f"*/*/{METRICS}")}
    to_send, left_out = [], Counter[str]()
    for folder in folders:
        if is_synced(folder):
            left_out["sent before"] += 1
        elif is_empty(folder):
            left_out["empty, as their process died at once"] += 1
        elif latest[_id(folder)] != folder:
            left_out["made again later"] += 1
        elif _id(folder) not in ended:
            left_out["not ended yet"] += 1
        else:
            to_send.append(folder)
    return to_send, left_out


def send(study: Path, folders: list[Path]) -> list[Path]:
    """Let W&B's own command send runs; returns the folders that it has not sent.

    Raises:
        InputError: the user is not logged in, or has told W&B to stay offline.
    """
    if os.environ.get("WANDB_MODE") in OFFLINE:
        raise InputError(f"WANDB_MODE={os.environ['WANDB_MODE']} keeps W&B from sending anything: unset it")
    if not logged_in():
        raise InputError("W&B does not know who you are: run wandb login, or set WANDB_API_KEY")
    environment = os.environ | {"WANDB_DATA_DIR": data_folder(study), "WANDB_DIR": str(study)}
    command = [*WANDB, "sync", "-n", str(PARALLEL_UPLOADS), *map(str, folders)]
    subprocess.run(command, env=environment, check=False)  # its exit code does not say whether a run was sent
    return [folder for folder in folders if not is_synced(folder)]


def is_synced(folder: Path) -> bool:
    """Whether W&B has sent an offline run."""
    return any(folder.glob("*.wandb.synced"))


def is_empty(folder: Path) -> bool:
    """Whether nothing of an offline run was recorded."""
    return all(file.stat().st_size <= HEADER for file in folder.glob("*.wandb"))


def _id(folder: Path) -> str:
    return without_attempt(folder.name.split("-", 3)[-1])  # offline-run-<time>-<id>


if __name__ == "__main__":
    start(main)
