"""Text: texts of the user's own whose likelihood is measured."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt

from cfsd.data.records import check_file, file_records
from cfsd.errors import BadInput
from cfsd.spec import Spec
from cfsd.store.digests import digest_of_files, sha256_of_file

WHOLE = (".txt", ".md")  # one document to a file
ALLOWED = (*WHOLE, ".jsonl")
SETTING = "evaluate.texts"


class Text(Spec):
    """Texts of the user's own whose likelihood is measured."""

    name: str = Field(pattern=r"^[\w .:-]+$", description="what it is called in the results")
    path: str = Field(description=".txt or .md, one document; .jsonl with `text`, a document to a line; or a folder")
    limit: PositiveInt | None = Field(None, description="the first N documents only")
    window: PositiveInt = Field(2048, description="most tokens read at once, or the model's context if that is less")

    def _identity(self) -> dict[str, Any]:
        settings = {k: v for k, v in super()._identity().items() if k not in ("name", "path")}
        digests = {f"{i}{path.suffix}": sha256_of_file(path) for i, path in enumerate(self.files())}
        return settings | {"content": digest_of_files(digests)}

    def files(self) -> list[Path]:
        """Return the files, in order. Raises BadInput if none can be read."""
        path = Path(self.path).expanduser()
        if not path.is_dir():
            check_file(path, f"text {self.name}", SETTING, "a text is needed", ALLOWED)
            return [path]
        files = sorted((p for p in path.rglob("*") if p.suffix in ALLOWED and p.is_file()), key=Path.as_posix)
        if not files:
            raise BadInput(f"text {self.name}: the folder {self.path!r} holds no {', '.join(ALLOWED)}; fix {SETTING}")
        return files

    def documents(self) -> Iterator[str]:
        """Return the documents in order, except empty ones. Raises BadInput naming file and place."""
        texts = (text for path in self.files() for text in self._texts(path) if text.strip())
        return islice(texts, self.limit)

    def check(self) -> None:
        """Raise BadInput if there is no document."""
        if next(self.documents(), None) is None:
            raise BadInput(f"text {self.name}: {self.path!r} holds no text; fix {SETTING}")

    def _texts(self, path: Path) -> Iterator[str]:
        if path.suffix not in WHOLE:
            for place, record in file_records(path, f"text {self.name}"):
                if not isinstance(text := record.get("text"), str):
                    raise BadInput(
                        f"text {self.name}: {place} has no `text`; its fields are "
                        f"{', '.join(map(repr, record)) or 'none'}"
                    )
                yield text
            return
        try:
            yield path.read_text(encoding="utf-8-sig")
        except ValueError as error:
            raise BadInput(f"text {self.name}: {str(path)!r} is not UTF-8: {error}") from error
