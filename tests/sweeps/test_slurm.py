"""A real Slurm of one node, without accounting: whatever becomes of a job, the sweep ends with its table."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from runners.results.progress import read_progress
from tests.conftest import missing
from tests.sweeps.endless import StartSweep, quantizing, wait_for

pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason=missing("hydra-submitit-launcher"))

from runners.sweeps.slurm import GONE, QueueWatcher

DAEMONS = ("munged", "slurmctld", "slurmd")
ENGINE = ["hydra/launcher=slurm", "hydra.launcher.gpus_per_node=null", "hydra.launcher.mem_gb=null"]
ENGINE += ["hydra.launcher.cpus_per_task=1"]
CONFIGURATION = """
ClusterName=quantease
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerParameters=batch_sched_delay=1,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=patient Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=cheap Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=CANCEL
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def free_port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return chosen.getsockname()[1]


@pytest.fixture(scope="module")
def slurm() -> Iterator[None]:
    """Slurm's daemons, as long as the tests last; the environment says where they are."""
    if missing := [name for name in DAEMONS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]:
        pytest.skip(f"{', '.join(missing)} is not installed (Debian: apt-get install slurm-wlm)")
    if os.getuid() != 0:
        pytest.skip("only root may start Slurm's daemons")
    folder = Path(f"/tmp/quantease-slurm-{os.getpid()}")  # short, and open to all: munge and Slurm insist on both
    with ExitStack() as stack:
        for name in ("state", "spool"):
            (folder / name).mkdir(parents=True)
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        host, cpus = socket.gethostname().split(".")[0], os.cpu_count()
        text = CONFIGURATION.format(host=host, cpus=cpus, folder=folder, ports=(free_port(), free_port()))
        (folder / "slurm.conf").write_text(text)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
            files = {
                "key-file": "munge.key",
                "socket": "munge.sock",
                "pid-file": "munge.pid",
                "seed-file": "munge.seed",
            }
            options = [f"--{option}={folder / file}" for option, file in files.items()]
            for command in (["munged", "-F", "--force", *options], ["slurmctld", "-D", "-c"], ["slurmd", "-D", "-c"]):
                program = shutil.which(command[0], path=f"{os.environ['PATH']}:/usr/sbin") or ""
                log = stack.enter_context((folder / f"{command[0]}.log").open("w"))
                daemon = subprocess.Popen([program, *command[1:]], stdout=log, stderr=log)
                stack.callback(daemon.wait, timeout=60)
                stack.callback(daemon.terminate)
                if command[0] == "munged":
                    wait_for((folder / "munge.sock").exists, seconds=30)
            stack.callback(subprocess.run, ["scancel", "--user=root"], check=False)
            wait_for(lambda: "idle" in ask("sinfo"), seconds=60)
            yield


def ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


def jobs(state: str) -> list[str]:
    return ask("squeue", "--noheader", "--array", f"--states={state}", "--format=%i").split()


def end(sweep: subprocess.Popen[str]) -> str:
    """Wait for the end of a sweep; its output, which has a table and no traceback."""
    out, _ = sweep.communicate(timeout=600)
    assert "Traceback" not in out
    assert "sacct" not in out
    assert "bits" in out
    return out


def rows(study: Path) -> dict[int, dict[str, str]]:
    found = [json.loads(file.read_text()) for file in study.glob("toy/*/metrics.json")]
    return {row["bits"]: row for row in found}


@pytest.fixture
def start_jobs(slurm: None, start_endless_sweep: StartSweep, tmp_path: Path) -> Iterator[StartSweep]:
    """Starts an endless sweep of two jobs; all are over at the end."""

    def start(*more: str) -> subprocess.Popen[str]:
        sweep = start_endless_sweep(subprocess.PIPE, *ENGINE, *more)
        # A command and its job import torch one after the other: half a minute where nothing else runs, minutes elsewhere.
        wait_for(lambda: bool(quantizing(tmp_path / "runs")) or sweep.poll() is not None)
        assert sweep.poll() is None, sweep.communicate()
        return sweep

    yield start
    subprocess.run(["scancel", "--user=root"], check=False)
    wait_for(lambda: not jobs("PENDING,RUNNING,COMPLETING"))


@pytest.mark.slow
def test_jobs_that_are_killed_or_cancelled_leave_their_rows(start_jobs: StartSweep, tmp_path: Path) -> None:
    sweep = start_jobs("hydra.launcher.array_parallelism=1")
    (folder,) = quantizing(tmp_path / "runs")
    (first,), (second,) = jobs("RUNNING"), jobs("PENDING")
    cell = (read_progress(folder) or {})["pid"]
    session = ask("ps", "-o", "sid=", "-p", str(cell)).strip()
    tree = [line for line in ask("ps", "-o", "pid=,args=", "-s", session).splitlines() if "slurmstepd" not in line]
    subprocess.run(["scancel", second], check=True)
    for line in tree:  # as where memory has run out: all processes of the job, but none of Slurm's own
        with suppress(ProcessLookupError):
            os.kill(int(line.split()[0]), signal.SIGKILL)
    out = end(sweep)
    assert sweep.returncode == 1
    assert f"error: job {first} ended without a result (FAILED): see {tmp_path}" in out
    assert f"error: job {second} ended without a result (CANCELLED): see {tmp_path}" in out
    assert [row["reason"] for row in rows(tmp_path / "runs").values()] == ["interrupted"]
    assert "2 of 2 cells have not ended: the same command again goes on with them" in out


@pytest.mark.slow
def test_a_job_that_is_requeued_is_waited_for(start_jobs: StartSweep, tmp_path: Path) -> None:
    sweep = start_jobs("bits=3")
    (job,), (folder,) = jobs("RUNNING"), quantizing(tmp_path / "runs")
    before = (read_progress(folder) or {})["pid"]
    subprocess.run(["scontrol", "requeue", job], check=True)
    wait_for(lambda: jobs("PENDING") == [job])
    assert rows(tmp_path / "runs")[3]["reason"] == "interrupted"
    time.sleep(5)
    assert sweep.poll() is None
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)  # else it waits for two minutes
    wait_for(lambda: quantizing(tmp_path / "runs") == [folder])
    assert (read_progress(folder) or {})["pid"] != before
    subprocess.run(["scancel", job], check=True)
    assert f"job {job} ended without a result (CANCELLED)" in end(sweep)
    assert rows(tmp_path / "runs")[3]["reason"] == "interrupted"


def preempt() -> str:
    """Start a job that takes the whole node from those of less priority; its id."""
    command = ["sbatch", "--parsable", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=sleep 3600"]
    job = ask(*command).strip()
    wait_for(lambda: job in jobs("RUNNING"))
    return job


@pytest.mark.slow
@pytest.mark.parametrize("partition", ["main", "patient"])
def test_a_job_that_is_preempted_and_requeued_is_waited_for(
    start_jobs: StartSweep, tmp_path: Path, partition: str
) -> None:
    sweep = start_jobs("bits=3", f"hydra.launcher.partition={partition}")
    (job,), (folder,) = jobs("RUNNING"), quantizing(tmp_path / "runs")
    before = (read_progress(folder) or {})["pid"]
    urgent = preempt()
    wait_for(lambda: jobs("PENDING") == [job])
    assert rows(tmp_path / "runs")[3]["reason"] == "interrupted"
    time.sleep(5)
    assert sweep.poll() is None
    subprocess.run(["scancel", urgent], check=True)
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)  # else it waits for two minutes
    wait_for(lambda: quantizing(tmp_path / "runs") == [folder])
    assert (read_progress(folder) or {})["pid"] != before
    subprocess.run(["scancel", job], check=True)
    assert f"job {job} ended without a result (CANCELLED)" in end(sweep)
    assert rows(tmp_path / "runs")[3]["reason"] == "interrupted"


@pytest.mark.slow
def test_a_job_that_is_preempted_for_good_leaves_its_row(start_jobs: StartSweep, tmp_path: Path) -> None:
    sweep = start_jobs("bits=3", "hydra.launcher.partition=cheap")
    (job,) = jobs("RUNNING")
    preempt()
    assert f"job {job} ended without a result (PREEMPTED)" in end(sweep)
    assert sweep.returncode == 1
    assert rows(tmp_path / "runs")[3]["reason"] == "interrupted"


@pytest.mark.slow
def test_a_job_whose_time_is_over_leaves_its_row(start_jobs: StartSweep, tmp_path: Path) -> None:
    # Three minutes, so that the job is at work when they are over, also where its start takes one or two.
    sweep = start_jobs("bits=3", "hydra.launcher.timeout_min=3", "hydra.launcher.signal_delay_s=20")
    out = end(sweep)
    assert sweep.returncode == 1
    assert "ended without a result (Job not requeued because: timed-out too many times.)" in out
    assert rows(tmp_path / "runs")[3]["reason"] == "interrupted"


@pytest.mark.slow
def test_an_interrupt_cancels_what_has_not_begun_and_names_what_runs_on(start_jobs: StartSweep, tmp_path: Path) -> None:
    sweep = start_jobs("hydra.launcher.array_parallelism=1")
    (first,), (second,) = jobs("RUNNING"), jobs("PENDING")
    sweep.send_signal(signal.SIGINT)
    out, _ = sweep.communicate(timeout=600)
    assert sweep.returncode == 130
    assert f"cancelled, as they had not begun: {second}\n" in out
    assert f"these jobs run on, and scancel ends them: scancel {first}\n" in out
    assert "Traceback" not in out
    assert jobs("RUNNING") == [first]
    assert jobs("PENDING") == []


@pytest.mark.slow
def test_jobs_that_are_refused_get_a_sentence(slurm: None, start_endless_sweep: StartSweep) -> None:
    sweep = start_endless_sweep(subprocess.PIPE, *ENGINE, "hydra.launcher.partition=nowhere")
    _, err = sweep.communicate(timeout=120)
    assert sweep.returncode == 2
    assert "error: Slurm has refused the jobs (" in err
    assert "invalid partition specified: nowhere" in err
    assert "Traceback" not in err


def test_a_job_is_over_when_the_queue_says_so_or_has_forgotten_it() -> None:
    watcher = QueueWatcher()
    for job in ("7_0", "7_1", "7_2", "7_3"):
        watcher.register_job(job)
    listed = "7_0|SUSPENDED|n1\n7_1|PENDING|\n7_2|PREEMPTED|n2\n9_0|RUNNING|n1\n"
    watcher._info_dict = watcher.read_info(listed)
    assert [watcher.is_done(job, "cache") for job in ("7_0", "7_1", "7_2", "7_3")] == [False, False, True, True]
    assert watcher.get_state("7_3", "cache") == GONE
    assert watcher.ended.keys() == {"7_2", "7_3"}
