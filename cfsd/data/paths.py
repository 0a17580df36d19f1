"""Paths: the files that a user means by a file, a folder, a pattern or a folder that `datasets` saved."""

import glob
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from cfsd.data.contents import FAILURES, contents_of, named_suffix

SPLITS, STATE = "dataset_dict.json", "state.json"  # in the folders that `datasets` saves
DEFAULT_SPLIT = "train"
HUB_NAME = re.compile(r"[\w.-]+/[\w-]+")  # `org/name`, without the dot of a file's suffix


def files_of(path: str, suffixes: tuple[str, ...], split: str) -> dict[str, Path]:
    """Return the files that `path` stands for, in order, by their names within the folder.

    In a folder that `datasets` saved these are its tables, of `split` if it has splits; else all files that are not
    hidden. Raises ValueError and OSError saying what is wrong and what to do.
    """
    place = Path(path).expanduser()
    if "://" in path:
        raise ValueError("is an address; download the file, or name a data set of a hub with `kind: hub`")
    if place.is_dir() and any((place / name).is_file() for name in (SPLITS, STATE)):
        return _saved(place, split)
    if split not in ("", DEFAULT_SPLIT) and named_suffix(place) != ".json":
        raise ValueError(f"has no splits, but `split` is {split!r}; name the file that is meant and leave `split` out")
    if place.is_dir():
        return _in_folder(place)
    if not os.path.lexists(place) and glob.has_magic(path):
        return _matching(place)
    check_file(place)
    if (suffix := named_suffix(place)) not in suffixes:
        raise ValueError(f"ends in {suffix!r}; allowed: {', '.join(suffixes)}{_what_else(place)}")
    if place.stat().st_size == 0:
        raise ValueError("is empty")
    return {place.name: place}


def check_file(path: Path, which: str = "") -> None:
    """Raise ValueError or OSError when `path` is no file that can be read again and again; `which` begins a message."""
    if not os.path.lexists(path):
        hub = "; a data set of a hub is named with `kind: hub`" if HUB_NAME.fullmatch(str(path)) else ""
        raise ValueError(f"{which}does not exist (working directory {Path.cwd()}){hub}")
    if not path.exists():
        raise ValueError(f"{which}is a link to {str(path.readlink())!r}, which does not exist")
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{which}is a pipe or a device, but is read more than once; write it into a file first")
    path.open("rb").close()


def _what_else(path: Path) -> str:
    try:
        contents_of(path)
    except FAILURES as error:
        return f" ({error})"
    return ""


def _in_folder(folder: Path) -> dict[str, Path]:
    names = sorted(path.relative_to(folder).as_posix() for path in _walk(folder))
    if saved := [name for name in names if Path(name).name == STATE]:
        parents = ", ".join(repr(str(folder / Path(name).parent)) for name in saved)
        raise ValueError(f"holds folders that `datasets` saved; name one of them: {parents}")
    return {name: folder / name for name in names}


def _walk(folder: Path) -> Iterator[Path]:
    """Yield what is not hidden in `folder` and below, linked folders too, those that lead back excepted."""

    def fail(error: OSError) -> NoReturn:
        raise error

    for root, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        above = Path(root).resolve()
        visible = (name for name in folders if not name.startswith("."))
        folders[:] = [name for name in visible if not above.is_relative_to((Path(root) / name).resolve())]
        yield from (Path(root) / name for name in files if not name.startswith("."))


def _matching(pattern: Path) -> dict[str, Path]:
    found = [Path(name) for name in glob.glob(str(pattern), recursive=True)]  # noqa: PTH207 - of an absolute path too
    if folders := [path for path in found if path.is_dir() and "**" not in str(pattern)]:
        raise ValueError(f"matches the folder {str(folders[0])!r}; name a folder as such, or match files")
    files = [path for path in found if not path.is_dir()]
    if not files:
        raise ValueError(f"matches no file (working directory {Path.cwd()})")
    parts = pattern.parts
    fixed = Path(*parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))])
    places: dict[tuple[Path, str], Path] = {}  # a link that leads back gives each file again and again
    for path in sorted(files, key=lambda path: (len(path.parts), path)):
        places.setdefault((path.parent.resolve(), path.name), path)
    return {name: fixed / name for name in sorted(path.relative_to(fixed).as_posix() for path in places.values())}


def _saved(folder: Path, split: str) -> dict[str, Path]:
    """Return the tables of a folder that `datasets` saved, in its order."""
    if (folder / SPLITS).is_file():
        splits = _read(folder / SPLITS, lambda value: [str(name) for name in value["splits"]])
        if split not in splits:
            raise ValueError(f"has the splits {', '.join(map(repr, splits))}, but not {split!r}: set `split`")
        folder = folder / split
    names = _read(folder / STATE, lambda value: [str(file["filename"]) for file in value["_data_files"]])
    if _read(folder / STATE, lambda value: value.get("_indices_data_files") or value.get("_indices_files")):
        raise ValueError("was saved with an order beside its rows; call flatten_indices() and save it again")
    return {name: folder / name for name in names}


def _read(path: Path, get: Callable[[Any], Any]) -> Any:
    try:
        return get(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"is a saved data set whose {path.name} cannot be read; save it again") from None
