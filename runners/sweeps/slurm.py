"""Slurm's jobs through submitit: their states come from the queue, and a job that dies is no error of the command.

submitit asks `sacct`, which needs an accounting database that many clusters do not have; without it, a job that was killed
counts as running for ever. `squeue` asks the controller, which always knows: a job that it does not list is over.
"""

import logging
import math
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from submitit.core.core import Job
from submitit.core.utils import FailedSubmissionError, UncompletedJobError
from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

from runners.errors import InputError

log = logging.getLogger(__name__)

GONE = "GONE"  # the controller has forgotten the job, as it does some minutes after its end
OVER = {
    *(
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
    ),
    *("TIMEOUT", GONE),
}  # the states without a way back; a job that is requeued is PENDING, one that is suspended SUSPENDED
POLL_SECONDS = 30  # between two questions to the controller, at most
PREEMPTION_SECONDS = 2.0  # between two questions of a job that is being preempted
RESULT_SECONDS = 15.0  # for the result of a job that has ended to appear in a folder on another machine

_results = Job.results


class QueueWatcher(SlurmInfoWatcher):
    """The states of this user's jobs, by `squeue`."""

    def __init__(self) -> None:
        super().__init__(delay_s=POLL_SECONDS)
        self.ended: dict[str, float] = {}  # when each job was first seen to be over, by the monotonic clock

    def _make_command(self) -> list[str] | None:
        if not self._registered - self._finished:
            return None
        # All of the user's: squeue refuses to answer for a list of ids if it has forgotten one of them.
        return ["squeue", "--noheader", "--array", "--states=all", f"--user={os.getuid()}", "--format=%i|%T|%N"]

    def read_info(self, string: str | bytes) -> dict[str, dict[str, str]]:
        """Job id, state and node of every registered job, from what squeue has printed."""
        text = string if isinstance(string, str) else string.decode()
        rows = [line.split("|") for line in text.splitlines() if line.count("|") == 2]
        found = {job: {"JobID": job, "State": state, "NodeList": nodes} for job, state, nodes in rows}
        return {job: found.get(job, {"JobID": job, "State": GONE, "NodeList": ""}) for job in self._registered}

    def is_done(self, job_id: str, mode: str = "standard") -> bool:
        """Whether the job is over."""
        is_over = self.get_state(job_id, mode) in OVER
        if is_over:
            self.ended.setdefault(job_id, time.monotonic())
        return is_over

    def in_state(self, state: str) -> list[str]:
        """The jobs that are in a state now."""
        self.update_if_long_enough("force")
        return sorted(job for job in self._registered if self.get_state(job, "cache") == state)


@contextmanager
def slurm() -> Iterator[None]:
    """Within it, submitit asks the queue and takes a job that died for a cell that has not ended.

    Raises:
        InputError: there is no Slurm, or it refuses the jobs.
    """
    if shutil.which("srun") is None:
        raise InputError(
            "hydra/launcher=slurm: there is no srun on this machine: start the sweep where Slurm's commands are, or use "
            "hydra/launcher=workers"
        )
    watcher = QueueWatcher()
    SlurmJob.watcher = watcher
    try:
        with ends_are_no_errors():
            yield
    except (UncompletedJobError, FailedSubmissionError) as error:  # of sbatch: those of jobs are logged
        words = " ".join(str(error).split())
        raise InputError(f"Slurm has refused the jobs ({words}): change hydra.launcher.partition and so on") from error
    except KeyboardInterrupt:
        _leave_jobs(watcher)
        raise


def wait_while_preempted() -> None:
    """In a job that is being preempted: stay until Slurm ends it, which is when Slurm requeues it, or does not.

    Where a partition has a GraceTime, SIGTERM comes that long before the end. A job that left at once would count as failed,
    and not be requeued.
    """
    while job := os.environ.get("SLURM_JOB_ID"):
        asked = subprocess.run(
            ["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True, check=False
        )
        words = dict(word.split("=", 1) for word in asked.stdout.split() if "=" in word)
        if words.get("JobState") != "RUNNING" or words.get("PreemptTime", "None") == "None":
            return
        time.sleep(PREEMPTION_SECONDS)


@contextmanager
def ends_are_no_errors() -> Iterator[None]:
    """Within it, a job of submitit without a result is a line in the log: its cell's folder tells what has become of it."""
    Job.results = _results_or_nothing
    try:
        yield
    finally:
        Job.results = _results


def _results_or_nothing(self: Job[Any]) -> list[Any]:
    """The result of a job; NaN, as of a cell that has failed, if it died or was stopped."""
    try:
        self.wait()
        if isinstance(self.watcher, QueueWatcher):
            since = time.monotonic() - self.watcher.ended.get(self.job_id, time.monotonic())
            self._results_timeout_s = max(0, RESULT_SECONDS - since)  # pyright: ignore[reportAttributeAccessIssue]
        (result,) = _results(self)
        if not isinstance(result._return_value, UncompletedJobError):
            return [result]
        why = str(result._return_value)  # submitit's handler of the signal before the end of its time has raised it
    except UncompletedJobError as error:
        log.debug("%s", error)
        why = self.watcher.get_state(self.job_id, "cache")
    log.error("error: job %s ended without a result (%s): see %s", self.job_id, why, self.paths.stderr)
    return [JobReturn(_return_value=math.nan, status=JobStatus.COMPLETED)]


def _leave_jobs(watcher: QueueWatcher) -> None:
    """After Ctrl-C: cancel the jobs that wait, which the same command submits again, and name those that run on."""
    if waiting := watcher.in_state("PENDING"):
        # Only those that still wait: one may have begun meanwhile.
        subprocess.run(["scancel", "--quiet", "--state=PENDING", *waiting], check=False)
        log.info("cancelled, as they had not begun: %s", " ".join(waiting))
    if running := watcher.in_state("RUNNING"):
        log.info("these jobs run on, and scancel ends them: scancel %s", " ".join(running))
