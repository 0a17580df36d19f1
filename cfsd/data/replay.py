"""Replay: the user's own documents, rehearsed in place of sampled text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from cfsd.data.records import FILES, Located, check_file, file_records, hub_records, is_pinned
from cfsd.errors import BadInput
from cfsd.machine import home
from cfsd.spec import Spec
from cfsd.store.digests import DigestMemory, digest_of_files, sha256_of_file

ALLOWED = (*FILES, ".txt")
REMEMBERED_FROM = 1 << 20  # bytes; a digest is remembered through a file that a thousand small ones would rewrite


class Replay(Spec):
    """Documents to rehearse in place of sampled text."""

    kind: Literal["file", "hub"] = Field(
        "file", description="file: a file or a folder of files; hub: a pinned data set"
    )
    path: str | None = Field(
        None, description="file only: JSONL, JSON, CSV or Parquet; .txt, one document to a file; a folder of these"
    )
    name: str | None = Field(None, description="hub only: the data set's id")
    revision: str | None = Field(None, description="hub only: the commit, 40 hex digits")
    subset: str | None = Field(None, description="hub only: one of the data set's configurations, if it has several")
    split: str = Field("train", description="hub only")
    column: str = Field("text", description="Where the text is, in files that have columns")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.kind == "file" and not self.path:
            raise ValueError("replay of kind file needs `path`")
        if self.kind == "hub" and not is_pinned(self.name, self.revision):
            raise ValueError(f"hub data set {self.name!r} needs `revision`, a commit of 40 hex digits")
        return self

    def _identity(self) -> dict[str, Any]:
        settings = super()._identity()
        if self.kind == "file":
            settings["path"] = digest_of_files({name: _sha256(path) for name, path in _files(self).items()})
        return settings

    def check(self) -> None:
        """Raise BadInput if there is no document to be had; reads no more than the first one."""
        if self.kind == "hub":
            return
        needed = "documents are needed"
        if not Path(self.path or "").is_dir():
            check_file(Path(self.path or ""), "replay", "generate.replay.path", needed, ALLOWED)
        files = _files(self)
        if wrong := [name for name, path in files.items() if path.suffix not in ALLOWED]:
            raise BadInput(
                f"replay folder {self.path!r} holds {wrong[0]!r} and {len(wrong) - 1} more files that are not "
                f"{', '.join(ALLOWED)}; move them out, or give one file"
            )
        if next(documents(self), None) is None:
            raise BadInput(f"replay {self.path!r} holds no text; {needed}")


def documents(replay: Replay) -> Iterator[str]:
    """Yield the documents in order, those without text left out. Each is held whole while it is read.

    Raises BadInput naming the file, or the columns where the wanted one is missing.
    """
    for place, record in _records(replay):
        if replay.column not in record:
            raise BadInput(
                f"replay {place} has no column {replay.column!r}; its columns are {', '.join(map(repr, record))}; "
                "set generate.replay.column"
            )
        text = record[replay.column]
        if not isinstance(text, str | None):
            raise BadInput(f"column {replay.column!r} of replay {place} holds {text!r:.60}, not a text")
        if text and text.strip():
            yield text


def _records(replay: Replay) -> Iterator[Located]:
    if replay.kind == "hub":
        name, revision = replay.name or "", replay.revision or ""
        yield from hub_records(name, revision, replay.split, replay.subset, replay.column)
        return
    for path in _files(replay).values():
        yield from file_records(path, "replay", replay.column)


def _files(replay: Replay) -> dict[str, Path]:
    """Return the files by what counts of their names: in a folder the order and the suffix, else the suffix."""
    path = Path(replay.path or "")
    if not path.is_dir():
        return {path.suffix: path}
    files = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
    names = sorted(file.as_posix() for file in files if not any(part.startswith(".") for part in file.parts))
    return {name: path / name for name in names}


def _sha256(path: Path) -> str:
    return DigestMemory(home()).sha256(path) if path.stat().st_size >= REMEMBERED_FROM else sha256_of_file(path)
