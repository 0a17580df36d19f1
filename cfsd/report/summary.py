"""Summary: the figures of one variant with 95 % intervals, and `summary.json` for many variants."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from cfsd.store.digests import write_json

SCHEMA = 2  # 1 had no comparisons

Fig = dict[str, Any]  # value, low, high, unit: a `cfsd.statistics.figures.Figure` as JSON


def with_bounds(name: str, figure: Fig | None) -> dict[str, Any]:
    """Return a figure and the ends of its interval by name, what is known of them."""
    parts = {"value": "", "low": "_low", "high": "_high"}
    return {f"{name}{end}": figure[part] for part, end in parts.items() if figure and figure[part] is not None}


class Summary(BaseModel):
    """The figures of one variant, with 95 % intervals. Signs: gain positive = learned, forgetting positive = worse.

    Measures of `cfsd.report.measures` are fields; those that no other code asks for by name need not be declared.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str
    digest: str
    target_gain: Fig | None  # base - tuned loss on held-out responses
    target_accuracy_gain: Fig | None  # tuned - base share of responses that greedy decoding writes
    target: dict[str, float]  # base_loss, tuned_loss, base_accuracy, tuned_accuracy
    probe_kl: Fig | None
    probe_kl_sampled: Fig | None
    mean_forgetting: Fig | None
    benchmarks: dict[str, dict[str, Any]]
    chat_kl: Fig | None = None  # KL(base || tuned) along answers of chats that the base sampled
    target_divergence: Fig | None = None  # KL(base || tuned) on held-out responses, given their prompts
    answers: dict[str, dict[str, dict[str, Any]]] = {}  # per benchmark with written ones and role: how they ended
    evaluation_warnings: list[str] = []  # what may make a benchmark's score other than it looks
    texts: dict[str, dict[str, Any]] = {}  # the user's own: documents, tokens, bytes, per_token, per_byte
    prompts: dict[str, dict[str, Any]] = {}  # the user's own: rows, tokens, kl, reverse_kl, moved
    chats: dict[str, Any] | None = None  # rows with an answer, tokens, unanswered, moved; reasoning, unfinished
    moved: dict[str, Any] | None = None  # divergence on the probe by_position and by_entropy of the base
    shown: dict[str, Any] | None = None  # answers to read: rows, as_base, and the artifacts base and tuned
    corpus_warnings: list[str] = []  # in what the corpus is not an exact sample of the base
    budget: dict[str, Any] | None = None  # was the budget of divergence met; None without one
    stability_gap: dict[str, dict[str, Any]] | None = None  # per watched measure: start, worst, final, gap
    training: dict[str, Any] | None = None  # seconds, tokens, peak_memory, …; None for a model from outside
    seconds: dict[str, float]
    executed: list[str]
    cached: list[str]


def write_summary(
    path: Path, summaries: list[Summary], comparisons: Iterable[BaseModel], matched: Iterable[BaseModel] = ()
) -> None:
    """Write `summary.json`; its schema is in docs/summary.md.

    `comparisons` are those of `cfsd.report.comparisons`, `matched` those of `cfsd.report.matched_gain`.
    """
    variants = {s.name: s.model_dump(mode="json", exclude={"name"}) for s in summaries}
    found, at_equal_gain = ([entry.model_dump(mode="json") for entry in entries] for entries in (comparisons, matched))
    content = {"schema": SCHEMA, "variants": variants, "comparisons": found}
    write_json(path, content | ({"matched_gain": at_equal_gain} if at_equal_gain else {}))
