"""Perplexity: how well a model predicts the user's own texts, each token once, in nats per token and per byte."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cfsd.errors import BadInput
from cfsd.evaluate.text import SETTING, Text
from cfsd.model.likelihood import score_responses


class Document(NamedTuple):
    """One document's sum of -log p over its tokens, in nats."""

    row_id: int
    nll: float
    tokens: int
    bytes: int
    text: str  # its beginning


def text_likelihoods(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", text: Text, start: int, max_tokens: int,
    on_progress: Callable[[int, int], None],
) -> list[Document]:  # fmt: skip
    """Return how well `model` predicts each document of `text` after the `start` token, every token once.

    Windows do not overlap but for one token, as lm-eval's rolling likelihood has them: the first of a window is
    predicted from the last of the one before alone.

    Raises: BadInput if there is no document.
    """
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
    found = score_responses(model, rows, max_tokens, lambda done: on_progress(done, len(rows)))
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
