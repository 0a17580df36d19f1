"""Replay: the user's own documents, rehearsed in place of sampled text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from cfsd.data.contents import key_suffix
from cfsd.data.files import ROWS, Files
from cfsd.data.records import Said, column_texts, hub_records
from cfsd.errors import BadInput
from cfsd.model.hub import DATA, MAIN
from cfsd.model.on_hub import OnHub
from cfsd.store.digests import digest_of_files

ALLOWED = (*ROWS, ".txt")
OF_KINDS = {"path": ("file",), "name": ("hub",), "subset": ("hub",), "revision": ("hub",)}


class Replay(OnHub):
    """Documents to rehearse in place of sampled text."""

    prefix: ClassVar[str] = DATA

    kind: Literal["file", "hub"] = Field("file", description="file: a file or a folder of files; hub: a data set")
    path: str | None = Field(
        None,
        description="file only: JSONL, JSON, CSV, TSV, Parquet or Arrow; .txt, one document to a file; each of them "
        "compressed too (.gz, .zst, .xz, .bz2); a folder of these, a pattern as `docs/*.txt`, or what `datasets` saved",
    )
    name: str | None = Field(None, description="hub only: the data set's id")
    subset: str | None = Field(None, description="hub only: one of the data set's configurations, if it has several")
    split: str = Field("train", description="hub, and files that hold several splits")
    column: str = Field("text", description="Where the text is, in files that have columns")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        self.check_fields("replay", OF_KINDS)
        if self.kind == "file" and not self.path:
            raise ValueError("replay of kind file needs `path`")
        if self.kind == "hub" and not self.name:
            raise ValueError("a data set of kind hub needs `name`, such as `openai/gsm8k`")
        return self

    def _identity(self) -> dict[str, Any]:
        settings = super()._identity()
        if self.kind == "hub":
            settings["revision"] = self.commit()
        if self.kind == "file":
            digests = self.files().digests()
            if self.files().is_one_file():  # of the name only the suffix counts
                digests = {key_suffix(Path(self.path or "")): digest for digest in digests.values()}
            settings["path"] = digest_of_files(digests)
        return settings

    def files(self) -> Files:
        """Return the files of kind file."""
        return Files(self.path or "", "replay", "generate.replay.path", ALLOWED, self.column, self.split)

    def check(self) -> None:
        """Raise BadInput if there is no document to be had; reads all of small files, of others the first document."""
        if self.kind == "hub":
            self.commit()
        if self.kind == "file" and self.files().first_of(documents(self)) is None:
            raise BadInput(f"replay {self.path!r} holds no text; documents are needed")


def documents(replay: Replay, said: Said | None = None) -> Iterator[str]:
    """Yield the documents in order, those without text left out. Each is held whole while it is read.

    What is read in one of several ways is added to `said`.
    Raises BadInput naming the file and place, or the columns where the wanted one is missing.
    """
    said = Said() if said is None else said
    if replay.kind == "hub":
        name, revision = replay.name or "", replay.revision or MAIN
        sets = [hub_records(name, revision, replay.split, replay.subset, replay.column)]
    else:
        files = replay.files()
        sets = [files.records_in(path, said) for path in files.find(said).values()]
    for records in sets:
        yield from column_texts(records, replay.column, "replay", "set generate.replay.column", said)
