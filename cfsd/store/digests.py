"""Content digests of files: sha256, remembered per path, size and mtime."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

READ_BYTES = 1 << 22


def sha256_of_file(path: Path) -> str:
    """Return the sha256 of the bytes of `path`, always read in full."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write `value` so that a reader sees the old file or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class DigestMemory:
    """sha256 of files, read again only when size or mtime changed.

    Paths below `home` are remembered relative to it, so that a moved data folder is not hashed anew.
    A lost update between two processes costs a second reading, nothing else.
    """

    def __init__(self, home: Path) -> None:
        """Open the memory kept in `home`."""
        self.home = home
        self.file = home / "digests.json"

    def sha256(self, path: Path) -> str:
        """Return the sha256 of `path`."""
        status = path.stat()
        name, stamp = self._name(path), [status.st_size, status.st_mtime_ns]
        known = self._load().get(name)
        if known and known[:2] == stamp:
            return str(known[2])
        digest = sha256_of_file(path)
        self.remember({name: [*stamp, digest]})
        return digest

    def remember(self, entries: dict[str, list[Any]]) -> None:
        """Add entries of name -> [size, mtime_ns, sha256]."""
        self.home.mkdir(parents=True, exist_ok=True)
        write_json(self.file, self._load() | entries)

    def _load(self) -> dict[str, list[Any]]:
        try:
            loaded: dict[str, list[Any]] = json.loads(self.file.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}
        return loaded

    def _name(self, path: Path) -> str:
        absolute = path.absolute()
        return str(absolute.relative_to(self.home)) if absolute.is_relative_to(self.home) else str(absolute)


def digest_of_files(digests: dict[str, str]) -> str:
    """Return the sha256 over relative names and their sha256, in name order."""
    lines = "".join(f"{name}\0{digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
