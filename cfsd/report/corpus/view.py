"""What is in a corpus: as sampled, after the filter and after selection, at what price, with rows to read.

Plain numbers and texts for the corpus page, from the tables alone, in bounded memory.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cfsd.data.ngrams import nearest_pairs
from cfsd.report.corpus.measure import Fractions, Inventory, Measured, inventory, measure
from cfsd.report.corpus.text import Decode, Rejected, TextRow, decoder, rejected_by, rows_at, text_row
from cfsd.store.artifact import Artifact, Store

NGRAM_TOKENS = 1_000_000  # distinct-n and repetition look at no more; each takes 8 bytes per order
PAIR_ROWS = 2000  # compared each with each: two million pairs, a few seconds
PAIRS = 5
SAMPLES = 20
FIRST_TOKENS = 12
BINS = 40  # at most
STAGES = ("sampled", "filtered", "selected")
LEFT_OUT = {"filtered": "rejected", "selected": "not selected"}


@dataclass(frozen=True)
class Stage:
    """The rows at one point: as sampled, kept by the filter, selected."""

    name: str
    key: str
    rows: int
    tokens: int  # sampled
    given: int  # tokens that were given to the model: start token, prompts, separators
    mean_logprob: float | None  # nats per sampled token, under the base
    finish_reasons: dict[str, int]
    distinct: dict[int, float]  # distinct-n by n; 1: no n-gram comes twice
    repetition: float | None  # mean over rows of the share of 4-grams that stood earlier in the row
    most_repetitive: float | None  # the same share, exceeded by one row in twenty
    repetition_rows: int  # that were looked at
    ngram_tokens: int  # that distinct-n was counted on


@dataclass(frozen=True)
class Histogram:
    """Rows per bin, of each group of rows; one edge more than bins."""

    edges: tuple[float, ...]
    counts: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class FirstToken:
    """A token with which sampled text begins."""

    text: str
    count: int
    share: float  # of all rows
    probability: float | None  # that the base gives it; None where the rows do not all begin alike


@dataclass(frozen=True)
class NearRows:
    """Two rows that share much: the Jaccard index of their 4-grams, and both."""

    overlap: float
    one: TextRow
    other: TextRow


@dataclass(frozen=True)
class CorpusView:
    """All that the page says of one corpus. Sources, samples and pairs are of the last stage."""

    key: str
    warnings: tuple[str, ...]
    exact: bool  # known to be a sample of the base model's own law
    halved_shards: int
    dropped_rows: dict[str, int]  # by reason, that the engine could not give as the table wants them
    engine: str
    top_k: int
    bytes_per_token: dict[str, float]  # on the disk, per column of the corpus as sampled
    stages: tuple[Stage, ...]
    sources: dict[str, float]  # share of the sampled tokens
    lengths: Histogram | None
    mean_logprobs: Histogram | None
    first_tokens: tuple[FirstToken, ...]
    samples: tuple[TextRow, ...]
    pairs: tuple[NearRows, ...]
    pair_rows: int  # that were compared, each with each
    rejected: dict[str, tuple[Rejected, ...]]  # by the stage that left them out
    accepted_by_rule: dict[str, float]  # of the rows that each rule of the filter was asked about
    selected_by: str

    @property
    def last(self) -> Stage:
        """The rows that are trained on."""
        return self.stages[-1]

    @property
    def accepted_fraction(self) -> float | None:
        """The share of the sampled rows that is left at the end."""
        return self.last.rows / self.stages[0].rows if self.stages[0].rows else None

    @property
    def mean_logprob_shift(self) -> float | None:
        """What filter and selection did to the mean log-probability, nats per token; 0 bends nothing."""
        before, after = self.stages[0].mean_logprob, self.last.mean_logprob
        return None if before is None or after is None else after - before


def corpus_warnings(metadata: Mapping[str, Any]) -> list[str]:
    """Return in what a corpus is not an exact sample of the base model's law; empty for an exact or empty one."""
    found = []
    if metadata.get("rows") != 0:
        if biased := metadata.get("biased"):
            found.append(f"biased: {'sampled from another distribution' if biased is True else biased}")
        if approximate := metadata.get("approximate"):
            what = "token ids not exact" if approximate is True else str(approximate)
            found.append(f"approximate: {what.removeprefix('approximate: ')}")
    return found


def describe_corpus(
    store: Store, corpus: Artifact, kept: Artifact | None, selected: Artifact | None, base: Artifact | None = None
) -> CorpusView:
    """Return what is in `corpus` and what became of it; `base` gives the tokenizer that tells tokens apart."""
    places = _places(corpus, kept, selected)
    sizes = {name: inventory(store.path(artifact)) for name, artifact in places.items()}
    measured = _measured(store, places, sizes)
    name, artifact = list(places.items())[-1]
    last, folder, decode = measured[name], store.path(artifact), decoder(store, base)
    pairs = nearest_pairs(last.sets, PAIRS)
    pair_places = [(last.places[pair.one], last.places[pair.other]) for pair in pairs]
    sample_places = _evenly_by_mean(last)
    rows = rows_at(folder, {*sample_places, *(place for two in pair_places for place in two)})
    texts = {place: text_row(row, decode) for place, row in rows.items()}
    return CorpusView(
        key=corpus.key,
        warnings=tuple(warnings := corpus_warnings(corpus.metadata)),
        exact=not warnings and "biased" in corpus.metadata and set(measured["sampled"].sources) == {"context-free"},
        halved_shards=_count(corpus.metadata.get("halved_shards")),
        dropped_rows=_fact(corpus, "dropped_rows", {}),
        engine=str(_fact(corpus, "engine", "") or store.manifest(corpus).get("environment", {}).get("engine") or ""),
        top_k=sizes["sampled"].top_k,
        bytes_per_token=_bytes_per_token(sizes["sampled"], measured["sampled"].tokens),
        stages=tuple(_stage(name, places[name].key, found) for name, found in measured.items()),
        sources={source: tokens / max(1, last.tokens) for source, tokens in last.sources.most_common()},
        lengths=_histogram({name: found.lengths() for name, found in measured.items()}, whole=True),
        mean_logprobs=_histogram({name: found.means() for name, found in measured.items()}, whole=False),
        first_tokens=tuple(_first_tokens(measured["sampled"], decode)),
        samples=tuple(texts[place] for place in sample_places),
        pairs=tuple(
            NearRows(pair.overlap, texts[one], texts[other])
            for pair, (one, other) in zip(pairs, pair_places, strict=True)
        ),
        pair_rows=len(last.sets),
        rejected={n: tuple(found) for n, a in places.items() if n in LEFT_OUT and (found := rejected_by(store, a))},
        accepted_by_rule=_fact(kept, "accepted_by_rule", {}),
        selected_by=_fact(selected, "method", ""),
    )


def _fact(artifact: Artifact | None, name: str, otherwise: Any) -> Any:
    return (artifact.metadata.get(name) if artifact else None) or otherwise


def _places(corpus: Artifact, kept: Artifact | None, selected: Artifact | None) -> dict[str, Artifact]:
    """Return the artifact of each stage that changed what it was given."""
    places = {STAGES[0]: corpus}
    for name, artifact in (("filtered", kept), ("selected", selected)):
        if artifact is not None and artifact.content != [*places.values()][-1].content:
            places[name] = artifact
    return places


def _measured(store: Store, places: dict[str, Artifact], sizes: dict[str, Inventory]) -> dict[str, Measured]:
    """Measure every stage on as many n-grams as the smallest has: distinct-n falls as the text grows."""
    tokens = min(NGRAM_TOKENS, *(size.tokens for size in sizes.values()))
    found: dict[str, Measured] = {}
    for name, artifact in places.items():
        size = sizes[name]
        most = NGRAM_TOKENS / max(1, size.tokens)
        fractions = Fractions(
            distinct=tokens / max(1, size.tokens),
            repetition=most,
            pairs=min(most, PAIR_ROWS / max(1, size.rows)) if name == [*places][-1] else 0,
        )
        found[name] = measure(store.path(artifact), fractions)
    return found


def _stage(name: str, key: str, found: Measured) -> Stage:
    repeated = found.repetition
    return Stage(
        name=name,
        key=key,
        rows=found.rows,
        tokens=found.tokens,
        given=found.given,
        mean_logprob=found.nats / found.tokens if found.has_logprobs and found.tokens else None,
        finish_reasons=dict(found.finish_reasons.most_common()),
        distinct=found.distinct(),
        repetition=float(np.mean(repeated)) if repeated else None,
        most_repetitive=float(np.quantile(repeated, 0.95)) if repeated else None,
        repetition_rows=len(repeated),
        ngram_tokens=found.ngram_tokens,
    )


def _histogram(values: dict[str, Any], *, whole: bool) -> Histogram | None:
    """Return the rows per bin of each group: those of the last stage, and those that each stage left out."""
    finite = {name: found[np.isfinite(found)].astype(np.float64) for name, found in values.items()}
    everything = finite["sampled"]
    if not len(everything):
        return None
    bins = BINS if whole else min(BINS, int(2 * len(everything) ** (1 / 3)) + 1)  # Rice's rule
    edges = _edges(float(everything.min()), float(everything.max()), bins, whole=whole)
    counts = {name: np.histogram(found, edges)[0] for name, found in finite.items()}
    *earlier, last = counts
    groups = {last: counts[last]}
    for before, after in zip(earlier, [*counts][1:], strict=True):
        groups[LEFT_OUT[after]] = np.maximum(counts[before] - counts[after], 0)
    shown = {name: tuple(found.tolist()) for name, found in groups.items() if found.any()}
    return Histogram(tuple(edges.tolist()), shown)


def _edges(low: float, high: float, bins: int, *, whole: bool) -> Any:
    if whole:
        step = -int(-(high - low + 1) // bins)
        return np.arange(low - 0.5, high + step, step)
    return np.linspace(low, high, bins + 1) if high > low else np.array([low - 0.5, low + 0.5])


def _first_tokens(found: Measured, decode: Decode | None) -> list[FirstToken]:
    """Return the most frequent first tokens; all context-free rows begin with the same probabilities."""
    alike = set(found.sources) == {"context-free"} and found.has_logprobs
    ranked = sorted(found.first_tokens.items(), key=lambda entry: (-entry[1][0], entry[0]))[:FIRST_TOKENS]
    rows = sum(int(count) for count, _ in found.first_tokens.values())
    return [
        FirstToken(
            text=json.dumps(decode([token]), ensure_ascii=False) if decode else f"token {token}",
            count=int(count),
            share=count / rows,
            probability=summed / count if alike else None,
        )
        for token, (count, summed) in ranked
    ]


def _evenly_by_mean(found: Measured) -> list[int]:
    """Return the places of rows to read, one from each twentieth of the rows in order of mean log-probability."""
    order = np.argsort(found.means(), kind="stable")
    chosen = (np.arange(min(SAMPLES, len(order))) + 0.5) * len(order) / min(SAMPLES, max(1, len(order)))
    return [int(order[int(rank)]) for rank in chosen]


def _count(value: Any) -> int:
    """Return how many things a fact names: a number of them, a list, or their names with commas between."""
    value = [part for part in value.split(",") if part.strip()] if isinstance(value, str) else value
    return len(value) if isinstance(value, list | dict) else int(value or 0)


def _bytes_per_token(size: Inventory, tokens: int) -> dict[str, float]:
    ranked = Counter(size.bytes_of).most_common()
    return {name: count / tokens for name, count in ranked} if tokens else {}
