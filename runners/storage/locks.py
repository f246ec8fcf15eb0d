"""Locks that end with their process: the kernel keeps them, and a file system without any is refused."""

import errno
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from runners.errors import InputError

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # where flock is not offered: some Lustre, FUSE and NFS mounts
SETTING = "results=FOLDER"  # with which the user moves the files


@contextmanager
def file_lock(file: Path, timeout: float) -> Iterator[bool]:
    """Lock a file against all other processes. The kernel releases the lock when its process dies, however it dies.

    Args:
        file: created if missing; its content has no meaning.
        timeout: seconds to wait for another process; -1: for ever.

    Yields:
        Whether the lock is held; False after the timeout.

    Raises:
        InputError: the file system has no locks, or refuses them.
    """
    lock = kernel_lock(file)
    if not acquire(lock, timeout):
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def kernel_lock(file: Path) -> BaseFileLock:
    """A lock on a file, not yet acquired, that the kernel keeps and releases when its process dies."""
    # Newer versions of filelock fall back to a lock that is a mere file, which a process that is killed, or a host that
    # goes down, leaves held for ever. The oldest ones refuse, and know no such option.
    is_offered = "fallback_to_soft" in inspect.signature(FileLock.__init__).parameters
    options: dict[str, Any] = {"fallback_to_soft": False} if is_offered else {}
    return FileLock(file, **options)


def acquire(lock: BaseFileLock, timeout: float, setting: str = SETTING) -> bool:
    """Acquire a `kernel_lock`.

    Args:
        timeout: seconds to wait for another process; -1: for ever.
        setting: what the user sets to have the file elsewhere.

    Returns:
        Whether it is held; False after the timeout.

    Raises:
        InputError: the file system has no locks, or refuses them.
    """
    is_held = _try(lock, 0, setting)
    if isinstance(lock, SoftFileLock):  # filelock 3.24 turns the lock into one, and has no option against it
        lock.release()
        raise InputError(_not_locked(lock, OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)), setting))
    return is_held or (timeout != 0 and _try(lock, timeout, setting))


def lock_shared(opened: IO[bytes]) -> None:
    """Lock an open file together with others, until it is closed: `others_share` then tells those who would remove it.

    Raises:
        OSError: the file system has no locks, or an exclusive one is held.
    """
    import fcntl  # which Windows has not: there nothing is held

    fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)


def others_share(file: Path) -> bool:
    """Whether another process has locked a file by `lock_shared`, or may have: where it cannot be told, it may."""
    try:
        import fcntl

        with file.open("r+b") as opened:  # NFS locks for one process alone only what is open for writing
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except (OSError, ImportError):
        return True
    return False


def _try(lock: BaseFileLock, timeout: float, setting: str) -> bool:
    try:
        lock.acquire(timeout=timeout)
    except Timeout:
        return False
    except (OSError, NotImplementedError) as error:
        raise InputError(_not_locked(lock, error, setting)) from error
    return True


def _not_locked(lock: BaseFileLock, error: Exception, setting: str) -> str:
    reason = getattr(error, "strerror", None) or error
    if isinstance(error, NotImplementedError) or getattr(error, "errno", None) in NO_LOCKS:
        return (
            f"{lock.lock_file} cannot be locked: its file system has no locks ({reason}), without which two processes "
            f"could write the same files: set {setting}, on a file system that has them"
        )
    return f"{lock.lock_file} cannot be locked ({reason}): set {setting}, where that is possible"
