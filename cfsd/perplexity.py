"""Perplexity: how well a model predicts the user's own texts, each token once, in nats per token and per byte."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pydantic import Field, PositiveInt

from cfsd.content import digest_of_files, sha256_of_file
from cfsd.errors import BadInput
from cfsd.records import check_file, file_records
from cfsd.spec import Spec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WHOLE = (".txt", ".md")  # one document to a file
ALLOWED = (*WHOLE, ".jsonl")
SETTING = "evaluate.texts"


class Text(Spec):
    """Texts of the user's own whose likelihood is measured."""

    unnamed: ClassVar[tuple[str, ...]] = ("name", "path")  # what does not count; the content does

    name: str = Field(pattern=r"^[\w .:-]+$", description="what it is called in the results")
    path: str = Field(description=".txt or .md, one document; .jsonl with `text`, a document to a line; or a folder")
    limit: PositiveInt | None = Field(None, description="the first N documents only")
    window: PositiveInt = Field(2048, description="most tokens read at once, or the model's context if that is less")

    def _identity(self) -> dict[str, Any]:
        settings = {name: value for name, value in super()._identity().items() if name not in self.unnamed}
        digests = {f"{i}{path.suffix}": sha256_of_file(path) for i, path in enumerate(self.files())}
        return settings | {"content": digest_of_files(digests)}

    def files(self) -> list[Path]:
        """Return the files, in order. Raises BadInput if there is none that can be read."""
        path = Path(self.path).expanduser()
        if not path.is_dir():
            check_file(path, f"text {self.name}", SETTING, "a text is needed", ALLOWED)
            return [path]
        found = sorted((p for p in path.rglob("*") if p.suffix in ALLOWED and p.is_file()), key=Path.as_posix)
        if not found:
            raise BadInput(f"text {self.name}: the folder {self.path!r} holds no {', '.join(ALLOWED)}; fix {SETTING}")
        return found

    def documents(self) -> Iterator[str]:
        """Yield the documents in order, those without text left out. Raises BadInput naming file and place."""
        number = 0
        for path in self.files():
            for text in self._texts(path):
                if self.limit is not None and number >= self.limit:
                    return
                if text.strip():
                    number += 1
                    yield text

    def check(self) -> None:
        """Raise BadInput if there is no document to be had."""
        if next(self.documents(), None) is None:
            raise BadInput(f"text {self.name}: {self.path!r} holds no text; fix {SETTING}")

    def _texts(self, path: Path) -> Iterator[str]:
        if path.suffix not in WHOLE:
            for number, record in enumerate(file_records(path, f"text {self.name}"), 1):
                if not isinstance(text := record.get("text"), str):
                    raise BadInput(
                        f"text {self.name}: document {number} of {str(path)!r} has no `text`; its fields are "
                        f"{', '.join(map(repr, record)) or 'none'}"
                    )
                yield text
            return
        try:
            yield path.read_text(encoding="utf-8-sig")
        except ValueError as error:
            raise BadInput(f"text {self.name}: {str(path)!r} is not UTF-8: {error}") from error


class Document(NamedTuple):
    """One document's sum of -log p over its tokens, in nats."""

    row_id: int
    nll: float
    tokens: int
    bytes: int
    text: str  # its beginning


def text_likelihoods(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", text: Text, start: int, most_tokens: int,
    on_progress: Callable[[int, int], None],
) -> list[Document]:  # fmt: skip
    """Return how well `model` predicts each document of `text` after the `start` token, every token once.

    Windows do not overlap but for one token, as lm-eval's rolling likelihood has them: the first of a window is
    predicted from the last of the one before alone.

    Raises: BadInput if there is no document.
    """
    from cfsd.responses import score_responses

    config: Any = model.config.get_text_config()
    longest = min(text.window, getattr(config, "max_position_embeddings", None) or text.window)
    texts = list(text.documents())
    if not texts:
        raise BadInput(f"text {text.name}: {text.path!r} holds no text; fix {SETTING}")
    owners: list[int] = []
    rows: list[dict[str, Any]] = []
    for i, document in enumerate(texts):
        token_ids = tokenizer.encode(document, add_special_tokens=False)
        for window in windows([start, *token_ids], longest):
            owners.append(i)
            rows.append({"token_ids": window, "supervised": [False] + [True] * (len(window) - 1)})
    found = score_responses(model, rows, most_tokens, lambda done: on_progress(done, len(rows)))
    sums, counts = [0.0] * len(texts), [0] * len(texts)
    for owner, part in zip(owners, found, strict=True):
        sums[owner] += part["nll"]
        counts[owner] += part["count"]
    return [Document(i, sums[i], counts[i], len(t.encode()), t[:200]) for i, t in enumerate(texts)]


def windows(token_ids: list[int], longest: int) -> Iterator[list[int]]:
    """Yield parts of at most `longest` tokens (2 or more), each beginning with the last token of the one before."""
    step = max(1, longest - 1)
    for first in range(0, len(token_ids) - 1, step):
        yield token_ids[first : first + step + 1]
