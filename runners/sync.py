"""`python -m runners.sync [study=tiny] [results=results] [dry_run=true]`: send the offline runs of a study to W&B.

A run is sent once: W&B leaves a `.synced` file in it. Left out are runs that have not ended and all but the latest of runs
that were made again. A study is sent from where it was made: W&B remembers the full paths of the tables it has staged.
"""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from runners.arguments import named_values
from runners.console import console
from runners.errors import InputError
from runners.results.run_folder import METRICS
from runners.tracking.content import run_id
from runners.tracking.weights_and_biases import OFFLINE, data_folder, logged_in

WANDB = [sys.executable, "-m", "wandb"]
AT_ONCE = 4  # runs that are sent at a time
DEFAULTS = {"study": "tiny", "results": "results", "dry_run": "false"}


@dataclass
class Plan:
    """What is to be done with the offline runs of a study.

    Attributes:
        send: their folders.
        left_out: why others are not sent, and how many.
    """

    send: list[Path] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)


def plan(study: Path) -> Plan:
    """Look through the offline runs of a study.

    Raises:
        InputError: there is no such study, or it has no offline runs.
    """
    if not study.is_dir():
        raise InputError(
            f"{study} is not the folder of a study: set study=NAME, and results=FOLDER if it lies elsewhere"
        )
    folders = sorted((study / "wandb").glob("offline-run-*"))  # in the order of their start
    if not folders:
        raise InputError(
            f"{study / 'wandb'} has no offline runs: they are made with tracker=wandb without being logged in"
        )
    latest = {_id(folder): folder for folder in folders}
    ended = {run_id(file.parent.name, study.name) for file in study.glob(f"*/*/{METRICS}")}
    answer = Plan()
    for folder in folders:
        if is_synced(folder):
            reason = "sent before"
        elif latest[_id(folder)] != folder:
            reason = "made again later"
        elif _id(folder) not in ended:
            reason = "not ended yet"
        else:
            answer.send.append(folder)
            continue
        answer.left_out[reason] = answer.left_out.get(reason, 0) + 1
    return answer


def send(study: Path, folders: list[Path]) -> list[Path]:
    """Let W&B send runs.

    Returns:
        Those that it has not sent.

    Raises:
        InputError: the user is not logged in.
    """
    if os.environ.get("WANDB_MODE") in OFFLINE:
        raise InputError(f"WANDB_MODE={os.environ['WANDB_MODE']} keeps W&B from sending anything: unset it")
    if not logged_in():
        raise InputError("W&B does not know who you are: run wandb login, or set WANDB_API_KEY")
    environment = os.environ | {"WANDB_DATA_DIR": data_folder(study), "WANDB_DIR": str(study)}
    subprocess.run([*WANDB, "sync", "-n", str(AT_ONCE), *map(str, folders)], env=environment, check=False)
    return [folder for folder in folders if not is_synced(folder)]


def is_synced(folder: Path) -> bool:
    """Whether W&B has sent an offline run: the command's exit code does not say."""
    return any(folder.glob("*.wandb.synced"))


def main(arguments: list[str]) -> None:
    """Send what has not been sent, and say what was."""
    options = named_values(arguments, DEFAULTS)
    if options["dry_run"] not in ("true", "false"):
        raise InputError(f"dry_run must be true or false, not {options['dry_run']!r}")
    study = Path(options["results"]) / options["study"]
    todo = plan(study)
    left_out = "".join(f", {count} {reason}" for reason, count in todo.left_out.items())
    if options["dry_run"] == "true":
        for folder in todo.send:
            console.print(str(folder), highlight=False, soft_wrap=True)
        console.print(f"{len(todo.send)} runs would be sent{left_out}")
        return
    failed = send(study, todo.send) if todo.send else []
    for folder in failed:
        console.print(f"not sent: {folder}", highlight=False, soft_wrap=True)
    console.print(f"{len(todo.send) - len(failed)} of {len(todo.send)} runs sent{left_out}")
    if failed:
        raise InputError(f"{len(failed)} runs were not sent; the same command again tries only those")


def _id(folder: Path) -> str:
    return folder.name.split("-", 3)[-1]  # offline-run-<time>-<id>


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("interrupted: the same command again sends the others") from None
