"""Content digests: sha256 of files, remembered per path, size and mtime, and of row values in any layout."""

import hashlib
import json
import os
import threading
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

DERIVED = b"derived"  # in the metadata of a column that follows from the others: it is no part of the digest
READ_BYTES = 1 << 22
_PARSED: dict[Path, tuple[tuple[int, int, int], dict[str, list[Any]]]] = {}  # file -> what it was when it was read


def sha256_of_file(path: Path) -> str:
    """Return the sha256 of the bytes of `path`, always read in full."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, value: Any, *, durable: bool = True, indent: int | None = 1) -> None:
    """Write `value` so that a reader sees the old file or the new one, never half of one.

    After a crash of the machine the file may be lost or old unless `durable`, which waits for the disk. Without
    `indent` it is all on one line, and written several times as fast.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    with temporary.open("w") as file:
        file.write(json.dumps(value, indent=indent, ensure_ascii=False))
        if durable:
            file.flush()
            os.fsync(file.fileno())
    temporary.replace(path)


class DigestMemory:
    """sha256 of files, read again only when size or mtime changed; of files outside of `home` also when ctime did.

    A link outside of `home` is what it leads to. Paths below `home` are remembered relative to it, so that a moved data
    folder is not hashed anew. A lost update between two processes costs a second reading, nothing else.
    """

    def __init__(self, home: Path) -> None:
        """Open the memory kept in `home`."""
        self.home = home
        self.file = home / "digests.json"

    def sha256(self, path: Path) -> str:
        """Return the sha256 of `path`."""
        return self.sha256s([path])[path]

    def sha256s(self, paths: Iterable[Path]) -> dict[Path, str]:
        """Return the sha256 of each path, and remember those that were read in one write of the whole memory."""
        known, found, read = self._load(), dict[Path, str](), dict[str, list[Any]]()
        for path in paths:
            name, stamp = self._name_and_stamp(path)
            entry = known.get(name)
            if isinstance(entry, list) and entry[:-1] == stamp:
                found[path] = str(entry[-1])
            else:
                found[path] = sha256_of_file(path)
                read[name] = [*stamp, found[path]]
        if read:
            self.remember(read)
        return found

    def forget(self, paths: Iterable[Path]) -> None:
        """Drop what is remembered of files, which are read again when they are asked for."""
        names = {self._name_and_stamp(path)[0] for path in paths}
        if names:
            with suppress(OSError):  # a data folder that can only be read
                kept = {name: entry for name, entry in self._load().items() if name not in names}
                write_json(self.file, kept, indent=None)

    def remember(self, entries: dict[str, list[Any]]) -> None:
        """Add entries of name -> [size, mtime_ns, sha256], outside of `home` with ctime_ns before the digest."""
        self.home.mkdir(parents=True, exist_ok=True)
        write_json(self.file, self._load() | entries, durable=False, indent=None)  # lost, it costs one reading

    def forget_gone(self) -> None:
        """Drop what is remembered of files that are not there any more."""
        known = self._load()
        kept = {name: entry for name, entry in known.items() if (self.home / name).exists()}  # absolute: as it is
        if len(kept) < len(known):
            write_json(self.file, kept, durable=False, indent=None)

    def _load(self) -> dict[str, list[Any]]:
        """Return all that is remembered, for reading: parsed again only where the file is another one.

        A plan asks for dozens of files. Beside 2,500 artifacts, 1.3 MB parsed each time took most of its time.
        """
        try:
            status = self.file.stat()
            stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
            if (known := _PARSED.get(self.file)) and known[0] == stamp:
                return known[1]
            loaded = json.loads(self.file.read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        found = loaded if isinstance(loaded, dict) else {}
        _PARSED[self.file] = (stamp, found)
        return found

    def _name_and_stamp(self, path: Path) -> tuple[str, list[int]]:
        status, absolute = path.stat(), path.absolute()
        stamp = [status.st_size, status.st_mtime_ns]
        if absolute.is_relative_to(self.home):
            return str(absolute.relative_to(self.home)), stamp
        return str(path.resolve()), [*stamp, status.st_ctime_ns]  # mtimes are copied with files, this one is not


def digest_of_files(digests: dict[str, str]) -> str:
    """Return the sha256 over relative names and their sha256, in name order."""
    lines = "".join(f"{name}\0{digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def digest_of_rows(files: Iterable[Path]) -> str:
    """Return the sha256 of the row values of Parquet `files` in the given order.

    How rows are divided into files, row groups and pages does not count: each column feeds
    its lengths, its nulls and its values to hashes of their own. Columns marked DERIVED do not count.
    """
    import pyarrow.parquet as pq  # late: settings are read without pyarrow

    parts: dict[str, Any] = defaultdict(hashlib.sha256)
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=4096):
            for field, column in zip(batch.schema, batch.columns, strict=True):
                if DERIVED not in (field.metadata or {}):
                    _feed(parts, field.name, column)
    return digest_of_files({name: part.hexdigest() for name, part in parts.items()})


def _feed(parts: dict[str, Any], name: str, column: Any) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        lengths = pc.list_value_length(column).fill_null(-1)
        parts[f"{name}/length"].update(lengths.to_numpy(zero_copy_only=False).astype("<i8").tobytes())
        _feed(parts, f"{name}/item", column.flatten())
    elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        lengths = pc.binary_length(column).fill_null(-1)
        parts[f"{name}/length"].update(lengths.to_numpy(zero_copy_only=False).astype("<i8").tobytes())
        parts[name].update("".join(text or "" for text in column.to_pylist()).encode())
    else:
        parts[f"{name}/null"].update(column.is_null().to_numpy(zero_copy_only=False).tobytes())
        values = column.fill_null(False if pa.types.is_boolean(column.type) else 0)
        parts[name].update(values.to_numpy(zero_copy_only=False).tobytes())
