"""Locks between processes: the kernel's, on a file, freed when the process that holds one dies."""

import errno
import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from cfsd.errors import BadEnvironment

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def held(path: Path, waiting: str, say: Callable[[str], None] = print) -> Iterator[None]:
    """Hold the lock on `path` for the block; `waiting` is said where another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(waiting)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def used(path: Path, *, alone: bool = False) -> Iterator[bool]:
    """Hold a lock that many share for the block, or `alone` hold it without any of them; yield whether that worked.

    Whoever shares it waits for the one that holds it alone, who never waits.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:  # NFS takes a lock that many share only on a file that is open for reading, too
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
        except BlockingIOError:
            yield False
        else:
            yield True


def check_locks(folder: Path) -> None:
    """Raise BadEnvironment where the filesystem of `folder` has no locks, OSError where nothing can be written."""
    path = folder / ".locks-work"
    with path.open("a+b") as file:
        try:
            for kind in (fcntl.LOCK_SH, fcntl.LOCK_EX):
                fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # another process tries the same
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            raise BadEnvironment(
                f"the filesystem of {folder} has no locks ({error.strerror}), which keep two processes from writing "
                "the same file; choose a data folder on another disk with --home"
            ) from error
