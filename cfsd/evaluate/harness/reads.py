"""Which files a benchmark's own Python reads outside its folder: their content is not in its key, which is said."""

import os
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

CACHE = "cfsd-score-"  # prefix of the folder that data is read into
_SYSTEM = ("/proc/", "/sys/", "/dev/", "/etc/", "/usr/")
_INSTALLED = (sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), str(Path(__file__).parents[3] / "cfsd"))


class _Watch(NamedTuple):
    places: tuple[str, ...]  # paths of the benchmark's own Python
    known: frozenset[str]  # its data files
    found: set[str]


_watch: ContextVar[_Watch | None] = ContextVar("watch", default=None)
_hooked: list[bool] = []


@contextmanager
def watched(places: set[str], data: list[Path]) -> Iterator[None]:
    """Note which other files Python below `places` opens within the block."""
    if not _hooked:
        _hooked.append(True)
        sys.addaudithook(_see)  # cannot be taken away again
    token = _watch.set(_Watch(tuple(places), frozenset(map(str, data)), set()) if places else None)
    try:
        yield
    finally:
        _watch.reset(token)


def read_elsewhere() -> list[str]:
    """Return the files that were read outside the benchmark's folder so far."""
    watch = _watch.get()
    return sorted(watch.found) if watch else []


def _see(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "open" or not (watch := _watch.get()) or not isinstance(arguments[0], str | os.PathLike):
        return
    mode = arguments[1] or "r"
    path = os.path.abspath(os.fsdecode(arguments[0]))  # noqa: PTH100  no Path, which is slow, for every file opened
    if "r" not in mode or _is_known(path, watch) or not _is_asked_by(sys._getframe(1), watch.places):
        return
    watch.found.add(path)


def _is_known(path: str, watch: _Watch) -> bool:
    below = (*watch.places, *_INSTALLED)
    is_ours = path in watch.known or path in watch.places or any(path.startswith(f"{place}{os.sep}") for place in below)
    return is_ours or path.startswith(_SYSTEM) or CACHE in path or f"{os.sep}." in path or not os.path.isfile(path)  # noqa: PTH113


def _is_asked_by(frame: FrameType | None, places: tuple[str, ...]) -> bool:
    while frame:
        file = frame.f_code.co_filename
        if file in places or any(file.startswith(f"{place}{os.sep}") for place in places):
            return True
        frame = frame.f_back
    return False
