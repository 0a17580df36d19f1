"""The Python of a benchmark: a score may depend on every file that it can read, so that all of them are in the key.

Without running it nobody knows what a module reads. The whole folder of the YAML counts, and so does each module that
is imported from elsewhere, unless it is installed. Installed packages are no part of any key.
"""

import ast
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NamedTuple

from cfsd.errors import BadInput
from cfsd.machine import home
from cfsd.store.digests import DigestMemory, digest_of_files, sha256_of_file

MAX_FILES, MAX_BYTES = 10_000, 10 << 30
PARSES = 20  # of one file, at most
REMEMBERED = 1 << 20  # bytes from which on a file is read again only when its size or its mtime changed
OURS = {"cfsd", "flows", "tasks"}
BACKUPS = ("~", ".pyc", ".pyo", ".swp", ".tmp")


class Code(NamedTuple):
    """The folder of a YAML file with `!function` tags, and the modules that these name."""

    folder: Path
    modules: frozenset[str]


def sha256(path: Path) -> str:
    """Return the sha256 of the content of `path`; a large file is read once."""
    try:
        return DigestMemory(home()).sha256(path) if path.stat().st_size >= REMEMBERED else sha256_of_file(path)
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}); make it readable, or take it away") from error


def digest_of_code(code: Code) -> str:
    """Return a digest over all files in the folder, by relative name, and over modules imported from elsewhere.

    Raises: BadInput where the folder is so large that it can hardly be a benchmark's.
    """
    digests = {str(path.relative_to(code.folder)): sha256(path) for path in _content(code.folder)}
    for place in _elsewhere(code):
        files = _content(place) if place.is_dir() else [place]
        digests |= {f"import {path.relative_to(place.parent)}": sha256(path) for path in files}
    return digest_of_files(digests)


def _content(folder: Path) -> list[Path]:
    """Return the files below `folder` that are content, links followed."""
    files: list[Path] = []
    size = 0
    for path in _walk(folder, set()):
        files.append(path)
        size += path.stat().st_size
        if len(files) > MAX_FILES or size > MAX_BYTES:
            raise BadInput(
                f"benchmark folder {folder}: its Python may read any of the files beside it, so that all of them count "
                f"in the key, and there are more than {MAX_FILES:,} files or {MAX_BYTES >> 30} GiB; put the "
                "benchmark's YAML, Python and data into a folder of their own"
            )
    return files


def _walk(folder: Path, seen: set[Path]) -> Iterator[Path]:
    real = folder.resolve()
    if real in seen or real == home().resolve() or (folder / "pyvenv.cfg").exists():
        return
    seen.add(real)
    for path in sorted(folder.iterdir()):
        if path.name.startswith((".", "#")) or path.name.endswith(BACKUPS) or path.name == "__pycache__":
            continue
        if path.is_dir():
            yield from _walk(path, seen)
        elif path.is_file():
            yield path


def _elsewhere(code: Code) -> list[Path]:
    """Return files and package folders outside the folder that its Python imports, directly or not."""
    found: dict[str, Path] = {}
    names = set(code.modules)
    for path in _content(code.folder):
        names |= _imported(path)
    while names:
        top = names.pop().partition(".")[0]
        if top in found or not (place := _local_module(top, code.folder)):
            continue
        found[top] = place
        for path in _content(place) if place.is_dir() else [place]:
            names |= _imported(path)
    return [found[top] for top in sorted(found)]


def _imported(path: Path) -> set[str]:
    """Return the absolute names that a Python file imports anywhere; one that is not Python imports nothing."""
    if path.suffix != ".py":
        return set()
    try:
        nodes = list(ast.walk(_parsed(path.read_bytes())))
    except (SyntaxError, ValueError, RecursionError):
        return set()
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module and not n.level}


def _parsed(source: bytes) -> ast.Module:
    """Return the tree of a Python file.

    Python before 3.11.8 counts the depth of all threads together, and raises SystemError where another one parses
    at the same time (cpython issue 106905); Prefect's threads do.
    """
    for _ in range(PARSES - 1):
        with suppress(SystemError):
            return ast.parse(source)
    return ast.parse(source)


def _local_module(top: str, folder: Path) -> Path | None:
    """Return the file or package folder of a module that is neither beside the YAML nor installed."""
    if not top or top in sys.stdlib_module_names or top in OURS:
        return None
    if (folder / f"{top}.py").exists() or (folder / top).exists():
        return None
    spec = PathFinder.find_spec(top)
    if spec is None or not spec.origin or not spec.has_location:
        return None
    path = Path(spec.origin)
    if {"site-packages", "dist-packages"} & set(path.parts) or path.suffix != ".py":
        return None
    return path.parent if spec.submodule_search_locations else path


def places_of(code: Code) -> set[str]:
    """Return the paths, links followed and not, below which the benchmark's own modules are."""
    places = [code.folder, *_elsewhere(code)]
    return {str(path) for place in places for path in (place.absolute(), place.resolve())}
