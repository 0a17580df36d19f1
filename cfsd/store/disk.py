"""A full disk, told from other errors: every library has its own words for it."""

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from cfsd.errors import BadEnvironment

FULL = (errno.ENOSPC, errno.EDQUOT)
WORDS = ("No space left on device", "Disk quota exceeded", "disk is full")  # safetensors, SQLite
NOTHING_LEFT = 1 << 16  # bytes: torch says only that a write failed
UNKNOWN = 1 << 62  # is not full
MIB = 1 << 20


def full_disk(error: BaseException, folder: Path) -> BadEnvironment | None:
    """Return what to tell where `error` came of a full disk, usually that of `folder`; None for other errors."""
    causes = list(_causes(error))
    found = [cause for cause in causes if _says_full(cause)]
    if not found and _free(folder) > NOTHING_LEFT:
        return None
    named = [Path(str(name)) for cause in found if isinstance(cause, OSError) for name in _names(cause)]
    places = [*map(_nearest, named), folder]
    return disk_is_full(next(filter(is_full, places), places[0]))


def _names(error: OSError) -> list[str | bytes]:
    """Return the files that an error names, of a copy the one that is written first."""
    return [name for name in (error.filename2, error.filename) if name]


def disk_is_full(folder: Path) -> BadEnvironment:
    """Return the error of a full disk that holds `folder`."""
    return BadEnvironment(
        f"the disk of {folder} is full ({_free(folder) / MIB:.1f} MiB free); what is finished is kept: free some, or "
        "copy the data folder to a larger disk and give it with --home; then run the same command again"
    )


def is_full(folder: Path) -> bool:
    """Say whether nothing more can be written beside `folder`."""
    return _free(folder) <= NOTHING_LEFT


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _says_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    return any(words in str(error) for words in WORDS)


def _free(folder: Path) -> int:
    try:
        usage = shutil.disk_usage(_nearest(folder))
    except OSError:
        return UNKNOWN
    return usage.free if usage.total else UNKNOWN  # as of /proc, which has no blocks


def _nearest(path: Path) -> Path:
    """Return `path`, or the folder above it that is there."""
    return next((place for place in (path, *path.absolute().parents) if _is_folder(place)), Path("/"))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that is too long
        return False
