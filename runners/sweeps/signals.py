"""Ctrl-C and SIGTERM: a command ends in order, and it ends for certain.

Python makes a KeyboardInterrupt of Ctrl-C, wherever the main thread is. That is not enough. Within a callback, such as those
of numba while it compiles, the interrupt is printed and forgotten: it is raised again here. And what libraries do while the
process ends may hang: at the first interrupt an alarm of the operating system is set, which needs nothing of Python to end
the process. Its cells see that, and leave.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from runners.errors import INTERRUPTED

LEAVE_SECONDS = 60  # after Ctrl-C until the process is gone, whatever it does; a cell is given 15 s of them
EXIT_SECONDS = 20  # of these for what libraries do at the end, when all is in order
AGAIN_SECONDS = 0.2  # after an interrupt was swallowed until it is raised again
# Interrupts in order: the first waits for the cell, the second ends it at once. One more ends the command, too.
MOST = 2
# What others send to all processes of a job; SIGUSR2 tells one of submitit that its time is nearly over.
SHARED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


@contextmanager
def interrupts_end_it() -> Iterator[None]:
    """Within it Ctrl-C raises KeyboardInterrupt, and the process is gone at most `LEAVE_SECONDS` later.

    Where Ctrl-C is ignored from the start, as in the background of a script, it stays ignored.
    """
    if not _in_main_thread() or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return
    count = 0

    def interrupt(*_: object) -> None:
        nonlocal count
        count += 1
        if count > MOST:
            for cell in multiprocessing.active_children():
                cell.kill()
            os._exit(INTERRUPTED)
        end_in_time()
        raise KeyboardInterrupt

    def interrupt_again(*_: object) -> None:  # nobody has pressed a key, so it does not count
        signal.signal(signal.SIGINT, interrupt)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with _swallowed_interrupts(signal.SIGINT, interrupt_again):
            yield
    finally:
        signal.signal(signal.SIGINT, before)
        if count:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.alarm(EXIT_SECONDS)


def end_in_time() -> None:
    """Let the operating system end this process in `LEAVE_SECONDS`, unless that is under way."""
    if signal.getsignal(signal.SIGALRM) is signal.SIG_DFL and signal.getitimer(signal.ITIMER_REAL)[0] == 0:
        signal.alarm(LEAVE_SECONDS)


@contextmanager
def sigterm_as_interrupt(then: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Treat SIGTERM, which schedulers send, as Ctrl-C, unless somebody else handles it (submitit does).

    Args:
        then: called before KeyboardInterrupt is raised.
    """
    is_free = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not is_free or not _in_main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        then()
        raise_interrupt()

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def raise_interrupt(*_: object) -> None:
    """The handler of SIGTERM: a second one must not interrupt the writing of the metrics."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextmanager
def signals_held() -> Iterator[None]:
    """Start processes that get no signals from their first moment, as they inherit that: the parent stops them, in order.

    The terminal sends Ctrl-C to all processes of the group, and a scheduler its signals to all processes of a job. A child,
    or the fork server, that died of one at once would leave no metrics, or no exit code. What this process is sent meanwhile
    it gets at the end.
    """
    if not _in_main_thread():
        yield
        return
    held: list[int] = []  # of signals that came to another thread: the mask is this thread's
    before = {name: signal.signal(name, lambda number, _: held.append(number)) for name in SHARED}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SHARED)
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, signal.SIG_DFL if handler is None else handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number in held:
            signal.raise_signal(number)


@contextmanager
def heeding_sigterm() -> Iterator[None]:
    """In a process that was started within `signals_held`: SIGTERM is an interrupt, also one that came before."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, raise_interrupt)
    with _swallowed_interrupts(signal.SIGTERM, raise_interrupt):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SHARED)
        yield


@contextmanager
def _swallowed_interrupts(number: int, handler: Callable[..., None]) -> Iterator[None]:
    """Within it a KeyboardInterrupt that Python cannot pass on is not printed; soon after it the signal comes again."""

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if unraisable.exc_type is not KeyboardInterrupt:
            before(unraisable)
            return
        signal.signal(number, handler)
        main = threading.main_thread().ident or 0
        timer = threading.Timer(AGAIN_SECONDS, signal.pthread_kill, (main, number))
        timer.daemon = True
        timer.start()

    before = sys.unraisablehook
    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
