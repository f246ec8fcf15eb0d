"""A command that is interrupted ends, whatever it was doing, and no signal is lost."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runners.errors import INTERRUPTED
from runners.sweeps.signals import interrupts_end_it, signals_held
from tests.conftest import PROJECT
from tests.sweeps.endless import StartSweep, session, wait_for

BEGINNING = """
import time
from runners.sweeps import signals
signals.LEAVE_SECONDS = {seconds}
"""
# Swallows every interrupt, and says so.
STUBBORN = """
with signals.interrupts_end_it():
    while True:
        try:
            print("here", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            pass
"""
# Is interrupted in a callback, which cannot pass it on, and waits on.
CALLBACK = """
class Left:
    def __del__(self):
        print("here", flush=True)
        time.sleep(60)
try:
    with signals.interrupts_end_it():
        left = Left()
        del left
        time.sleep(60)
except KeyboardInterrupt:
    print("interrupted")
"""
# Hangs on leaving.
HANGING = """
import atexit
signals.EXIT_SECONDS = 1
atexit.register(time.sleep, 60)
with signals.interrupts_end_it():
    print("here", flush=True)
    time.sleep(60)
"""


def start(program: str, seconds: int = 1000) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BEGINNING.format(seconds=seconds) + program]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # not ignored, wherever the tests run
    pipe = subprocess.PIPE
    try:
        return subprocess.Popen(command, cwd=PROJECT, stdout=pipe, stderr=pipe, text=True)
    finally:
        signal.signal(signal.SIGINT, before)


def interrupt(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)


def test_a_command_ends_though_the_interrupt_is_caught() -> None:
    process = start(STUBBORN, seconds=1)
    interrupt(process)
    assert process.wait(timeout=30) == -signal.SIGALRM


def test_a_command_ends_though_its_exit_hangs() -> None:
    process = start(HANGING)
    interrupt(process)
    assert process.wait(timeout=30) == -signal.SIGALRM


def test_an_interrupt_that_a_callback_cannot_pass_on_comes_again() -> None:
    process = start(CALLBACK)
    interrupt(process)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "interrupted\n", "")


def test_the_third_interrupt_ends_a_command_at_once() -> None:
    process = start(STUBBORN)
    for _ in range(3):
        interrupt(process)
    assert process.wait(timeout=30) == INTERRUPTED


def test_an_interrupt_that_is_ignored_from_the_start_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts_end_it():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_interrupts_was_is_restored() -> None:
    # Set here, because whatever a script starts in its background ignores interrupts.
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with interrupts_end_it():
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, outside)


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGUSR2])
def test_a_signal_that_comes_while_a_process_starts_comes_afterwards(name: signal.Signals) -> None:
    came: list[int] = []
    child = "import signal; print(*(int(name) for name in signal.pthread_sigmask(signal.SIG_BLOCK, [])))"
    before = signal.signal(name, lambda number, _: came.append(number))
    try:
        with signals_held():
            os.kill(os.getpid(), name)
            answer = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True)
            assert came == []
        assert came == [name]
    finally:
        signal.signal(name, before)
    assert str(int(name)) in answer.stdout.split()  # and its child waits for it, too
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system has no /proc")
def test_an_interrupt_while_libraries_load_is_no_traceback() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    command = [sys.executable, str(PROJECT / "run.py"), "dry_run=true"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    wait_for(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text(), seconds=60)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (-signal.SIGINT, "", "")


def test_ctrl_c_while_the_first_cell_starts(start_endless_sweep: StartSweep, tmp_path: Path) -> None:
    sweep = start_endless_sweep(subprocess.PIPE)
    wait_for(lambda: any("multiprocessing.forkserver" in line for line in session(sweep.pid)), seconds=300)
    for _ in range(2):
        os.killpg(sweep.pid, signal.SIGINT)
        time.sleep(0.2)
    out, err = sweep.communicate(timeout=90)
    assert sweep.returncode in (INTERRUPTED, -signal.SIGINT)
    assert "Traceback" not in out + err
    wait_for(lambda: not session(sweep.pid), seconds=30)
