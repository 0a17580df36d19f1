"""Contents of a file of the user's: decompressed, told from what merely has its name, and decoded."""

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

HEAD = 1 << 12  # bytes that show what a file is
PACKED = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"\xfd7zXZ\0": ".xz", b"BZh": ".bz2"}
TABLES = {b"PAR1": ".parquet", b"ARROW1": ".arrow", b"\xff\xff\xff\xff": ".arrow"}
MARKS = {
    b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16",
}  # fmt: skip
OTHERS = {
    b"version https://git-lfs": "a Git LFS pointer: the data themselves were not fetched; run `git lfs pull`",
    b"PK\x03\x04": "a zip archive, as Excel's .xlsx is: unpack it, or save the sheet as CSV in UTF-8",
    b"\xd0\xcf\x11\xe0": "a file of an old Office program: save it as CSV in UTF-8",
    b"\x93NUMPY": "a NumPy array: save the rows as JSONL or Parquet",
    b"SQLite format 3": "a database: export the table as CSV in UTF-8",
    b"%PDF": "a PDF: extract its text",
}
PICKLE = "a pickle, which is never read: it could run any program; save the rows as JSONL or Parquet"
OTHERS |= {bytes([0x80, protocol]): PICKLE for protocol in range(2, 6)}
PAGES = (b"<!doctype html", b"<html")
WHOLE = (".txt", ".md")  # one document to a file
FAILURES = (
    ValueError, OSError, EOFError, zlib.error, lzma.LZMAError, csv.Error, RecursionError, NotImplementedError,
)  # fmt: skip


class Contents(NamedTuple):
    """A file by what is in it: how it is packed, the suffix of what it holds, and the encoding of text."""

    path: Path
    packed: str
    suffix: str
    encoding: str

    def open(self) -> IO[bytes]:
        """Return the bytes, decompressed."""
        return opened(self.path, self.packed)

    def text(self, newline: str | None = None) -> io.TextIOWrapper:
        """Return the text; `newline` as in `open`. Reading raises UnicodeDecodeError, see `wrong_byte`."""
        return io.TextIOWrapper(self.open(), encoding=self.encoding, newline=newline)

    def wrong_byte(self) -> str:
        """Return where the first byte is that is no part of the text, and what it is."""
        if self.encoding != "utf-8-sig":
            return f"it begins with the mark of {self.encoding.upper()}, but is not; save it as UTF-8"
        with self.open() as file:
            for number, line in enumerate(file, 1):
                try:
                    line.decode()
                except UnicodeDecodeError as error:
                    found = f"line {number} byte {error.start + 1} is 0x{line[error.start]:02x}, which is not UTF-8"
                    return f"{found}; convert the file to UTF-8, as by iconv -f latin1 -t utf-8"
        return "it is not UTF-8"


def opened(path: Path, packed: str) -> IO[bytes]:
    """Return the bytes of `path`, decompressed as `packed` says."""
    if packed == ".zst":
        import pyarrow as pa  # late: a recipe is read without pyarrow

        stream: Any = pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")
        return io.BufferedReader(stream)
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return cast("IO[bytes]", openers.get(packed, open)(path, "rb"))


def contents_of(path: Path) -> Contents:
    """Return what `path` holds by its first bytes, by its name where they may be anything.

    Raises ValueError saying what it is and what to do when it is nothing that can be read.
    """
    with path.open("rb") as file:
        packed = next((suffix for magic, suffix in PACKED.items() if file.peek(8).startswith(magic)), "")
    with opened(path, packed) as unpacked:
        head = unpacked.read(HEAD)
    if words := next((words for magic, words in OTHERS.items() if head.startswith(magic)), None):
        raise ValueError(f"it is {words}")
    if head[:20].lower().startswith(PAGES) and named_suffix(path) not in WHOLE:
        raise ValueError("it is a web page; download the file itself")
    if table := next((suffix for magic, suffix in TABLES.items() if head.startswith(magic)), None):
        return Contents(path, packed, table, "")
    encoding = next((name for mark, name in MARKS.items() if head.startswith(mark)), "utf-8-sig")
    if encoding == "utf-8-sig" and head[:200].count(0) > len(head[:200]) / 4:
        raise ValueError("it is no text, or UTF-16 without a byte order mark; save it as UTF-8")
    return Contents(path, packed, _text_suffix(named_suffix(path), head), encoding)


def named_suffix(path: Path) -> str:
    """Return the suffix in lower case, the one before it where that says how the file is packed."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED.values():
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def key_suffix(path: Path) -> str:
    """Return what of a file's name decides how it is read: its suffix, and the one before that of a packed file."""
    own = path.suffix
    return named_suffix(path) + own if own.lower() in PACKED.values() else own


def _text_suffix(suffix: str, head: bytes) -> str:
    """Return `suffix`, or that of JSON if the file is named as a table and begins with an object."""
    if suffix not in (".csv", ".tsv", ".parquet", ".arrow"):
        return suffix
    begin = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    try:
        is_object = isinstance(json.loads(begin.partition(b"\n")[0]), dict)
    except (ValueError, RecursionError):
        is_object = False
    if is_object or (begin[:1] in b"[{" and suffix in (".parquet", ".arrow")):
        return ".jsonl"
    if suffix in (".parquet", ".arrow"):
        raise ValueError(f"it is no {suffix} file: it does not begin as one")
    return suffix
