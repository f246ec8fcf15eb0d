"""One GPU for each cell, whatever starts them: with counts that are made up, on machines without any."""

import dataclasses
import os
import tempfile
import threading
import time
from pathlib import Path

import pynvml
import pytest
import torch

from quantease.grid import GridSpec
from quantease.layer import LayerProblem, LayerSolver, QuantizedLayer, Unsupported
from runners.config.run import Method
from runners.sweeps.gpus import VISIBLE, lease
from runners.sweeps.isolation import run_isolated
from tests.conftest import ToySettings


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    show_driver(monkeypatch, [f"GPU-{letter}" for letter in "abcdefgh"])
    monkeypatch.delenv(VISIBLE, raising=False)


def show_driver(monkeypatch: pytest.MonkeyPatch, uuids: list[str]) -> None:
    """NVIDIA's driver, with GPUs of these UUIDs."""
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: len(uuids))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUUID", lambda handle: uuids[handle])


@pytest.mark.usefixtures("two_gpus")
def test_two_cells_never_share_a_gpu_and_a_third_waits(caplog: pytest.LogCaptureFixture) -> None:
    third: list[str] = []

    def wait() -> None:
        with lease("cuda") as given:
            third.append(given[VISIBLE])

    with lease(None) as first:
        with lease(None) as second, caplog.at_level("INFO"):
            assert [first, second] == [{VISIBLE: "0"}, {VISIBLE: "1"}]
            waiting = threading.Thread(target=wait)
            waiting.start()
            time.sleep(1)
            assert third == []
            assert caplog.messages == ["all 2 GPUs are taken: waiting for one"]
        waiting.join(timeout=120)
        assert third == ["1"]


@pytest.mark.usefixtures("two_gpus")
def test_many_cells_at_once() -> None:
    in_use: set[str] = set()
    shared: list[str] = []

    def cell() -> None:
        with lease(None) as given:
            shared.extend(in_use & {given[VISIBLE]})
            in_use.add(given[VISIBLE])
            time.sleep(0.05)
            in_use.discard(given[VISIBLE])

    cells = [threading.Thread(target=cell) for _ in range(6)]
    for thread in cells:
        thread.start()
    for thread in cells:
        thread.join()
    assert shared == []


@pytest.mark.usefixtures("two_gpus")
def test_only_what_the_launcher_has_given_is_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "6,7")
    with lease(None) as first, lease(None) as second:
        assert [first[VISIBLE], second[VISIBLE]] == ["6", "7"]
    # A scheduler shows each job its own GPU as number 0: the UUID tells them apart.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv(VISIBLE)
    with lease(None):
        show_driver(monkeypatch, ["GPU-c"])
        with lease(None) as other:
            assert other == {VISIBLE: "0"}


@pytest.mark.usefixtures("two_gpus")
def test_without_the_driver_gpus_are_told_apart_by_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    with lease(None) as first, lease(None) as second:
        assert [first[VISIBLE], second[VISIBLE]] == ["0", "1"]


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_what_the_user_has_chosen_is_left_to_them(device: str) -> None:
    with lease(device) as given:
        assert given == {}


def test_a_machine_without_a_gpu_has_nothing_to_hand_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with lease(None) as given:
        assert given == {}


@dataclasses.dataclass(frozen=True)
class Tells(LayerSolver):
    """A method that tells which GPU its process may use."""

    def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
        raise Unsupported(f"{VISIBLE}={os.environ.get(VISIBLE)}")


@pytest.mark.usefixtures("two_gpus")
def test_the_cell_gets_its_gpu_before_it_starts(toy_settings: ToySettings) -> None:
    settings = toy_settings("method=rtn").replace(method=Method("tells", Tells()))
    with lease(None):
        row = run_isolated(settings)[-1]
    assert row["error"].endswith(f"{VISIBLE}=1")
