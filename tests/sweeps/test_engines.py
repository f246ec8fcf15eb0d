"""Launchers that work on this machine: what they leave behind, and who can reach them."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import PROJECT, ToySettings
from tests.sweeps.conftest import needs_launcher
from tests.sweeps.endless import StartSweep, quantizing, session, wait_for


@pytest.mark.parametrize("cells_at_a_time", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_nothing_outlives_a_command_that_is_killed(
    cells_at_a_time: int, start_endless_sweep: StartSweep, tmp_path: Path
) -> None:
    needs_launcher("joblib")
    more = ["hydra/launcher=workers", f"hydra.launcher.n_jobs={cells_at_a_time}"]  # a third worker has nothing to do
    sweep = start_endless_sweep(subprocess.DEVNULL, *more)
    wait_for(lambda: len(quantizing(tmp_path / "runs")) == 2)
    assert len(session(sweep.pid)) > cells_at_a_time
    sweep.kill()
    sweep.wait()
    wait_for(lambda: not session(sweep.pid), seconds=60)
    rows = [json.loads(file.read_text()) for file in tmp_path.glob("runs/toy/*/metrics.json")]
    assert [row["reason"] for row in rows] == ["interrupted", "interrupted"]


def listening(leader: int) -> set[str]:
    """The addresses on which processes of a session listen, as /proc has them: `0100007F` is 127.0.0.1."""
    pids = subprocess.run(["ps", "-o", "pid=", "-s", str(leader)], capture_output=True, text=True).stdout.split()
    links = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                links.add(os.readlink(descriptor))
            except FileNotFoundError:  # closed meanwhile
                continue
    lines = [
        line.split() for kind in ("tcp", "tcp6") for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]
    ]
    return {line[1].split(":")[0] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in links}


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="this system has no /proc/net")
def test_a_ray_of_its_own_listens_on_this_machine_alone(start_endless_sweep: StartSweep, tmp_path: Path) -> None:
    needs_launcher("ray")
    sweep = start_endless_sweep(subprocess.DEVNULL, "hydra/launcher=ray_local")
    wait_for(lambda: len(quantizing(tmp_path / "runs")) == 2)
    found = listening(sweep.pid)
    assert found
    assert found <= LOOPBACK
    sweep.terminate()
    sweep.wait(timeout=120)
    wait_for(lambda: not session(sweep.pid), seconds=60)


def test_a_ray_that_is_not_there_gets_a_sentence(tmp_path: Path) -> None:
    needs_launcher("ray")
    command = [sys.executable, "run.py", "-m", "hydra/launcher=ray_cluster", "method=rtn", f"results={tmp_path}"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    answer = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
    if answer.returncode == 0:
        pytest.skip("a Ray runs on this machine")
    assert answer.returncode == 2
    assert "error: there is no Ray at hydra.launcher.ray.init.address=auto" in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.fixture
def ray_of_two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """A Ray of two nodes with one CPU each, and a token; its address, and the environment of who may use it."""
    needs_launcher("ray")
    elsewhere = tmp_path_factory.mktemp("ray")  # short: the names of sockets may have 107 characters
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 32, "RAY_USAGE_STATS_ENABLED": "0"}
    ray = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--num-cpus=1", "--num-gpus=0"]
    ray += ["--object-store-memory=80000000"]
    address = "127.0.0.1:26379"
    head = ["--head", "--port=26379", "--include-dashboard=false", "--temp-dir=/tmp/quantease-ray"]
    head += ["--node-manager-port=26380", "--object-manager-port=26381", "--ray-client-server-port=26382"]
    with ExitStack() as nodes:
        for options in (head, [f"--address={address}", "--min-worker-port=27100", "--max-worker-port=27150"]):
            log = nodes.enter_context((elsewhere / f"{options[0]}.log".replace("/", "")).open("w+"))
            node = subprocess.Popen(
                [*ray, *options], cwd=elsewhere, env=environment, stdout=log, stderr=log, start_new_session=True
            )
            nodes.callback(node.wait, timeout=60)
            nodes.callback(os.killpg, node.pid, signal.SIGTERM)
            wait_for(lambda log=log: "Ray runtime started" in Path(log.name).read_text(), seconds=120)
        yield address, environment


@pytest.mark.slow
def test_a_ray_that_runs_already(
    ray_of_two_nodes: tuple[str, dict[str, str]], toy_settings: ToySettings, tmp_path: Path
) -> None:
    address, environment = ray_of_two_nodes
    toy = toy_settings()
    arguments = ["model=local", f"model.path={toy.run.model.path}", "calibration.num_sequences=6", "calibration=c4"]
    arguments += ["evaluation=wikitext2", "tracker=none", f"data_root={toy.execution.data_root}", "bits=3,4"]
    # From another folder than the nodes', with a relative path: the cells must find it. The second goes on with the first.
    for launcher, methods, expected in (("ray", "rtn", 3), ("ray_cluster", "rtn,gptq", 5)):
        engine = [f"hydra/launcher={launcher}", f"hydra.launcher.ray.init.address={address}", f"method={methods}"]
        command = [sys.executable, str(PROJECT / "run.py"), "-m", *engine, *arguments, "results=here"]
        answer = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert answer.returncode == 0, answer.stdout + answer.stderr
        assert "Traceback" not in answer.stdout + answer.stderr
        rows = [json.loads(file.read_text()) for file in (tmp_path / "here").glob("runs/toy/*/metrics.json")]
        assert [row["status"] for row in rows] == ["done"] * expected
