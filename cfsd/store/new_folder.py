"""A new folder that a user named: it is whole, or not there."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cfsd.errors import BadInput
from cfsd.machine import expanded_user

PART = ".part"


@contextmanager
def new_folder(to: Path) -> Iterator[Path]:
    """Yield a folder that takes the place of `to` at the end; after an error nothing of it is left.

    It is made beside `to`, or in it where `to` is an empty folder: that may be a disk of its own, or one's only place.

    Raises: BadInput if `to` exists and is not an empty folder.
    """
    to = expanded_user(to).absolute()  # "." has no name, and none beside it
    if to.exists() and (not to.is_dir() or any(file.name != PART for file in to.iterdir())):
        raise BadInput(f"{to} exists and is not an empty folder; give another one")
    part = to / PART if to.exists() else to.with_name(f".{to.name}{PART}")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        _put(part, to)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _put(part: Path, to: Path) -> None:
    if part.parent != to:
        part.rename(to)
        return
    for file in part.iterdir():
        file.rename(to / file.name)
    part.rmdir()
