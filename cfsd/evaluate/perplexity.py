"""Perplexity: how well a model predicts the user's own texts, each token once, in nats per token and per byte."""

from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any

import pyarrow as pa
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cfsd.evaluate.stage import check_finite, load_models, write_result
from cfsd.evaluate.text import Text
from cfsd.machine import Machine
from cfsd.model.context import context_tokens
from cfsd.model.likelihood import score_responses
from cfsd.model.loading import load_tokenizer, read_start_token
from cfsd.store.artifact import Artifact, Draft

BEGINNING = 200  # characters of a document that its record holds


def score_text(model: Artifact, text: Text, draft: Draft, machine: Machine) -> None:
    """Write each document's negative log-likelihood as the `texts` table."""
    folder = draft.store.path(model)
    (loaded,) = load_models([model], draft, machine)
    records = text_likelihoods(
        loaded, load_tokenizer(folder), text, read_start_token(folder), machine.micro_batch_tokens,
        context_tokens(model),
        lambda done, total: draft.journal.progress(done, total, "windows"),
    )  # fmt: skip
    check_finite(records, "nll")
    nll, tokens, size = (sum(record[name] for record in records) for name in ("nll", "tokens", "bytes"))
    loss = {"nats_per_token": nll / tokens, "nats_per_byte": nll / size}
    metadata = {"text": text.name, "documents": len(records), "tokens": tokens, "bytes": size} | loss
    if said := text.said():
        metadata |= {"said": said}
    figures = {f"eval/{text.name}/{name}": value for name, value in loss.items()}
    write_result(draft, "texts", pa.Table.from_pylist(records), metadata, figures)


def text_likelihoods(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: Text, start: int, max_tokens: int, context: int,
    on_progress: Callable[[int, int], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """Return how well `model` predicts each document of `text` after the `start` token, every token once.

    Per document: `row_id`, `nll` (the sum of -log p over its tokens, in nats), `tokens`, `bytes` and its beginning.

    Windows do not overlap but for one token, as lm-eval's rolling likelihood has them: the first of a window is
    predicted from the last of the one before alone.
    """
    longest = min(text.window, context)
    documents = list(text.documents())
    encoded = [[start, *tokenizer.encode(document, add_special_tokens=False)] for document in documents]
    parts = [list(windows(token_ids, longest)) for token_ids in encoded]
    rows = [{"token_ids": part, "supervised": [False] + [True] * (len(part) - 1)} for part in chain(*parts)]
    scores = iter(score_responses(model, rows, max_tokens, lambda done: on_progress(done, len(rows))))
    records = []
    for i, (document, of_document) in enumerate(zip(documents, parts, strict=True)):
        scored = list(islice(scores, len(of_document)))
        nll, tokens = sum((score["nll"] for score in scored), 0.0), sum(score["count"] for score in scored)
        size, beginning = len(document.encode()), document[:BEGINNING]
        records.append({"row_id": i, "nll": nll, "tokens": tokens, "bytes": size, "text": beginning})
    return records


def windows(token_ids: list[int], longest: int) -> Iterator[list[int]]:
    """Yield parts of at most `longest` tokens (2 or more), each beginning with the last token of the one before."""
    step = max(1, longest - 1)
    for first in range(0, len(token_ids) - 1, step):
        yield token_ids[first : first + step + 1]
