"""A new folder that a user named: it is whole, or not there."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cfsd.errors import BadInput


@contextmanager
def new_folder(to: Path) -> Iterator[Path]:
    """Yield a folder beside `to` that takes its place at the end; after an error nothing of it is left.

    Raises: BadInput if `to` exists and is not an empty folder.
    """
    to = to.absolute()  # "." has no name, and none beside it
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise BadInput(f"{to} exists and is not an empty folder; give another one")
    part = to.with_name(f".{to.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        _put(part, to)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _put(part: Path, to: Path) -> None:
    if not to.exists():
        part.rename(to)
        return
    for file in part.iterdir():  # an empty folder stays the one that it is: a shell may be in it
        file.rename(to / file.name)
    part.rmdir()
