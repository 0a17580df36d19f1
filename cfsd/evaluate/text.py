"""Text: texts of the user's own whose likelihood is measured."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from pydantic import Field, PositiveInt

from cfsd.data.contents import WHOLE
from cfsd.data.files import ROWS, Files
from cfsd.data.records import Said, column_texts
from cfsd.errors import BadInput
from cfsd.spec import Spec

SETTING = "evaluate.texts"
COLUMN = "text"
REMEDY = f"give records a field `text`, or name the files that are meant by a pattern in {SETTING}"


class Text(Spec):
    """Texts of the user's own whose likelihood is measured."""

    name: str = Field(pattern=r"^[\w .:-]+$", description="what it is called in the results")
    path: str = Field(
        description=".txt or .md, one document; JSONL, JSON, CSV, TSV, Parquet or Arrow with `text`, a document to a "
        "record; each of them compressed too; a folder, a pattern as `docs/*.md`, or what `datasets` saved"
    )
    limit: PositiveInt | None = Field(None, description="the first N documents only")
    window: PositiveInt = Field(2048, description="most tokens read at once, or the model's context if that is less")

    def _identity(self) -> dict[str, Any]:
        settings = {k: v for k, v in super()._identity().items() if k not in ("name", "path")}
        return settings | {"content": self.files().content()}

    def files(self) -> Files:
        """Return the files; in a folder those of other kinds are left out."""
        return Files(self.path, f"text {self.name}", SETTING, (*WHOLE, *ROWS), COLUMN, "train", leaves_others=True)

    def documents(self, said: Said | None = None) -> Iterator[str]:
        """Return the documents in order, except empty ones. Raises BadInput naming file and place."""
        return islice(self._texts(Said() if said is None else said), self.limit)

    def said(self) -> list[str]:
        """Return what is read in one of several ways, a sentence for each."""
        said = Said()
        for _ in self.documents(said):
            pass
        return said.sentences()

    def check(self) -> None:
        """Raise BadInput if there is no document; reads all of small files, of others the first document."""
        if self.files().first_of(self.documents()) is None:
            raise BadInput(f"text {self.name}: {self.path!r} holds no text; fix {SETTING}")

    def _texts(self, said: Said) -> Iterator[str]:
        files = self.files()
        for path in files.find(said).values():
            yield from column_texts(files.records_in(path, said), COLUMN, files.what, REMEDY, said)
