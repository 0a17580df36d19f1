"""Files: what the user names at one place of a recipe, found, checked, identified and read as records."""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from cfsd.data.arrow_records import arrow_records
from cfsd.data.contents import FAILURES, PACKED, WHOLE, contents_of, key_suffix, named_suffix
from cfsd.data.csv_records import csv_records
from cfsd.data.json_records import json_records
from cfsd.data.paths import check_file, files_of
from cfsd.data.records import Located, Said, whole_characters
from cfsd.errors import BadInput
from cfsd.machine import home
from cfsd.store.digests import DigestMemory, digest_of_files, sha256_of_file

ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
# in the names of a split's files, and of folders with them
SPLIT = re.compile(r"(?:^|[-_./])(train|test|validation|valid|val|dev|eval)(?=[-_./\d])", re.IGNORECASE)
READ_BY_CHECKS = 1 << 24  # bytes: files of so much are read whole by a check, of larger ones the first record
REMEMBERED_FROM = 1 << 20  # bytes; a digest is remembered through a file that a thousand small ones would rewrite

T = TypeVar("T")


class Files(NamedTuple):
    """What the user named: a file, a folder of files, a pattern, or a folder that `datasets` saved.

    `what` is its name in messages and `setting` where it was given; `suffixes` are those allowed, each of them packed
    as well. `column` is the only one that is needed and the one of a whole document; `split` is taken of several.
    """

    path: str
    what: str
    setting: str
    suffixes: tuple[str, ...] = ROWS
    column: str | None = None
    split: str = ""
    leaves_others: bool = False  # files of other kinds in a folder are left out, else refused

    def find(self, said: Said | None = None) -> dict[str, Path]:
        """Return the files in order by their names within the folder. Raises BadInput saying what is wrong."""
        try:
            found = self._without_others(files_of(self.path, self.suffixes, self.split), said)
            for name, path in found.items():
                check_file(path, f"holds {name!r}, which ")
        except (ValueError, OSError) as error:
            reason = f"cannot be read: {error}" if isinstance(error, OSError) else error
            raise BadInput(f"{self.what} {self.path!r} {reason}; fix {self.setting}") from None
        return found

    def _without_others(self, found: dict[str, Path], said: Said | None) -> dict[str, Path]:
        kept = {name: path for name, path in found.items() if named_suffix(path) in self.suffixes}
        others = [name for name in found if name not in kept]
        if others and not self.leaves_others:
            raise ValueError(
                f"holds {others[0]!r} and {len(others) - 1} more files that are not {', '.join(self.suffixes)}; "
                f"move them out, or name those that are meant by a pattern, as {self.path.rstrip('/')}/*.jsonl"
            )
        if said is not None:
            self._say_splits(kept, said)
        if others and said is not None:
            said.add(f"{others[0]!r} and {len(others) - 1} more files of other kinds are left out", repr(self.path))
        return kept

    def _say_splits(self, names: Iterable[str], said: Said) -> None:
        """Say where files of a training split are read beside those of others."""
        found: dict[str, str] = {}
        for name in names:
            if match := SPLIT.search(name):
                found.setdefault(match[1].lower(), _pattern(name, *match.span(1)))
        if "train" not in found or len(found) == 1:
            return
        as_in = f", as {Path(self.path, found['train']).as_posix()}" if Path(self.path).expanduser().is_dir() else ""
        splits = ", ".join(sorted(found))
        said.add(f"files of several splits ({splits}) are all read; name those that are meant{as_in}", repr(self.path))

    def digests(self) -> dict[str, str]:
        """Return the sha256 of each file by its name within the folder, in order."""
        return {os.fsencode(name).decode("utf-8", "backslashreplace"): _sha256(p) for name, p in self.find().items()}

    def content(self) -> str:
        """Return the digest of what the files hold, in order; of their names only the endings count."""
        digests = enumerate(self.digests().items())
        return digest_of_files({f"{i}{key_suffix(Path(name))}": digest for i, (name, digest) in digests})

    def is_one_file(self) -> bool:
        """Return whether one file is named as such."""
        return Path(self.path).expanduser().is_file()

    def first_of(self, items: Iterator[T]) -> T | None:
        """Return the first of what is read from the files; if they are small, the others are read too, as a check."""
        first = next(items, None)
        if sum(path.stat().st_size for path in self.find().values()) <= READ_BY_CHECKS:
            for _ in items:
                pass
        return first

    def records(self, said: Said) -> Iterator[Located]:
        """Yield the records of all files; what is read in one of several ways is added to `said`; raises BadInput."""
        for path in self.find(said).values():
            yield from self.records_in(path, said)

    def records_in(self, path: Path, said: Said) -> Iterator[Located]:
        """Yield the records of one of the files in order. Raises BadInput naming the file and the place."""
        try:
            for place, record in self._read(path, said):
                if not isinstance(record, dict):
                    raise ValueError(f"{place} is not an object with named fields")
                yield Located(f"{str(path)!r} {place}".rstrip(), record)
        except UnicodeDecodeError:
            raise self._unreadable(path, contents_of(path).wrong_byte()) from None
        except FAILURES as error:
            cut = isinstance(error, EOFError) or "Truncated" in str(error)
            reason = "it was cut short; copy or download it again" if cut else str(error)
            raise self._unreadable(path, reason) from error

    def _unreadable(self, path: Path, reason: str) -> BadInput:
        return BadInput(f"{self.what} {str(path)!r} could not be read as {named_suffix(path)[1:]}: {reason}")

    def _read(self, path: Path, said: Said) -> Iterator[tuple[str, Any]]:
        contents = contents_of(path)
        packed = path.suffix.lower() if path.suffix.lower() in PACKED.values() else ""
        if (contents.packed, contents.suffix) != (packed, named_suffix(path)):
            said.add(f"it is read as {contents.suffix}{contents.packed}, which is what it holds", repr(str(path)))
        if contents.suffix in WHOLE:
            with contents.text() as file:
                yield "", {self.column: file.read()}
        elif contents.suffix in (".csv", ".tsv"):
            yield from csv_records(contents, said)
        elif contents.suffix in (".parquet", ".arrow"):
            yield from arrow_records(contents, self.column)
        else:
            yield from json_records(contents, self.column, self.split, said)


def _pattern(name: str, begin: int, end: int) -> str:
    """Return a pattern of the files that have the same word where `name` has it, from `begin` to `end`."""
    folder = name.rfind("/", 0, begin) + 1
    before = "*" if begin > folder else ""
    return f"{name[:folder]}{before}{name[begin:end]}*" + ("/*" if "/" in name[end:] else "")


def _sha256(path: Path) -> str:
    remembered = path.stat().st_size >= REMEMBERED_FROM and whole_characters(str(path)) == str(path)
    return DigestMemory(home()).sha256(path) if remembered else sha256_of_file(path)
