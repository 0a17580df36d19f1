"""What is in a corpus, as sampled, filtered and selected, from its tables alone and in bounded memory."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cfsd.data.ngrams import nearest_pairs
from cfsd.report.corpus.measure import Fractions, Inventory, Stage, inventory, measure_stage
from cfsd.report.corpus.text import Decode, Rejected, TextRow, decoder, rejected_by, rows_at
from cfsd.store.artifact import Artifact, Store

NGRAM_TOKENS = 1_000_000  # at most for distinct-n and repetition; each takes 8 bytes per order
PAIR_ROWS = 2000  # compared each with each: two million pairs, a few seconds
PAIRS = 5
SAMPLES = 20
FIRST_TOKENS = 12
BINS = 40  # at most
LEFT_OUT = {"filtered": "rejected", "selected": "not selected"}


class Histogram(NamedTuple):
    """Rows per bin, of each group of rows; one edge more than bins."""

    edges: tuple[float, ...]
    counts: dict[str, tuple[int, ...]]


class FirstToken(NamedTuple):
    """A token with which sampled text begins."""

    text: str
    rows: int
    share: float  # of all rows
    probability: float | None  # under the base; None where the rows do not all begin alike


class NearRows(NamedTuple):
    """Two rows that share much: the Jaccard index of their 4-grams, and both."""

    overlap: float
    one: TextRow
    other: TextRow


@dataclass(frozen=True)
class CorpusView:
    """All that the page says of one corpus. Sources, samples and pairs are of the last stage."""

    key: str
    warnings: tuple[str, ...]
    exact: bool  # known to be a sample of the base model's own distribution
    halved_shards: int
    dropped_rows: dict[str, int]  # by reason, that the engine could not give as the table wants them
    reasoning: int  # rows in which the base thinks before it answers
    unfinished: int  # ... in which that did not end
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
    rejected: tuple[Rejected, ...]
    accepted_by_rule: dict[str, float]  # of the rows that each rule of the filter was asked about
    selected_by: str

    @property
    def last(self) -> Stage:
        """The rows that are trained on."""
        return self.stages[-1]

    @property
    def lines(self) -> dict[str, list[float | None]]:
        """The figures that some stage has, by label, one per stage."""
        columns = [stage.figures() for stage in self.stages]
        lines = {label: [column.get(label, 0.0) for column in columns] for label in columns[0]}
        return {label: values for label, values in lines.items() if any(value is not None for value in values)}

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
    """Return why a corpus is not an exact sample of the base model's distribution; empty for an exact or empty one."""
    words = ("biased", "approximate") if metadata.get("rows") != 0 else ()
    return [f"{word}: {metadata[word]}" for word in words if metadata.get(word)]


def describe_corpus(
    store: Store, corpus: Artifact, filtered: Artifact | None, selected: Artifact | None, base: Artifact | None = None
) -> CorpusView:
    """Return what is in `corpus` and what became of it; `base` gives the tokenizer, by which tokens become text."""
    artifacts = _stages_that_changed(corpus, filtered, selected)
    sizes = {name: inventory(store.path(artifact)) for name, artifact in artifacts.items()}
    stages = tuple(_measured(store, artifacts, sizes))
    size, sampled, last, decode = sizes["sampled"], stages[0], stages[-1], decoder(store, base)
    compared, places = list(last.pair_sets), _evenly_by_mean(last)
    nearest = nearest_pairs(list(last.pair_sets.values()), PAIRS)
    read = {*places, *(compared[i] for pair in nearest for i in (pair.one, pair.other))}
    rows = rows_at(store.path(artifacts[last.name]), read, decode)
    warnings, engine = corpus_warnings(corpus.metadata), store.manifest(corpus).get("environment", {}).get("engine")
    return CorpusView(
        key=corpus.key,
        warnings=tuple(warnings),
        exact=not warnings and "biased" in corpus.metadata and set(sampled.sources) == {"context-free"},
        halved_shards=len(_metadata(corpus, "halved_shards", {})),
        dropped_rows=_metadata(corpus, "dropped_rows", {}),
        reasoning=_metadata(corpus, "reasoning", 0),
        unfinished=_metadata(corpus, "unfinished", 0),
        engine=str(_metadata(corpus, "engine", "") or engine or ""),
        top_k=size.top_k,
        bytes_per_token={c: n / sampled.tokens for c, n in Counter(size.bytes_of).most_common() if sampled.tokens},
        stages=stages,
        sources={source: tokens / max(1, last.tokens) for source, tokens in last.sources.most_common()},
        lengths=_histogram({stage.name: stage.lengths() for stage in stages}, whole=True),
        mean_logprobs=_histogram({stage.name: stage.means() for stage in stages}, whole=False),
        first_tokens=_first_tokens(sampled, decode),
        samples=tuple(rows[place] for place in places),
        pairs=tuple(NearRows(p.overlap, rows[compared[p.one]], rows[compared[p.other]]) for p in nearest),
        rejected=rejected_by(store, artifacts["filtered"]) if "filtered" in artifacts else (),
        accepted_by_rule=_metadata(filtered, "accepted_by_rule", {}),
        selected_by=_metadata(selected, "method", ""),
    )


def _metadata(artifact: Artifact | None, name: str, otherwise: Any) -> Any:
    return (artifact.metadata.get(name) if artifact else None) or otherwise


def _stages_that_changed(corpus: Artifact, filtered: Artifact | None, selected: Artifact | None) -> dict[str, Artifact]:
    artifacts = {"sampled": corpus}
    for name, artifact in (("filtered", filtered), ("selected", selected)):
        if artifact is not None and artifact.content != [*artifacts.values()][-1].content:
            artifacts[name] = artifact
    return artifacts


def _measured(store: Store, artifacts: dict[str, Artifact], sizes: dict[str, Inventory]) -> Iterator[Stage]:
    """Yield every stage, measured on as many n-grams as the smallest has: distinct-n falls as the text grows."""
    fewest = min(NGRAM_TOKENS, *(size.tokens for size in sizes.values()))
    for name, artifact in artifacts.items():
        rows, tokens = max(1, sizes[name].rows), max(1, sizes[name].tokens)
        bounded = NGRAM_TOKENS / tokens
        pairs = min(bounded, PAIR_ROWS / rows) if name == [*artifacts][-1] else 0
        yield measure_stage(name, store.path(artifact), Fractions(fewest / tokens, bounded, pairs))


def _histogram(values: dict[str, Any], *, whole: bool) -> Histogram | None:
    """Return the rows per bin of each group: those of the last stage, and those that each stage left out."""
    finite = {name: numbers[np.isfinite(numbers)].astype(np.float64) for name, numbers in values.items()}
    everything = finite["sampled"]
    if not len(everything):
        return None
    edges = _edges(float(everything.min()), float(everything.max()), len(everything), whole=whole)
    counts = {name: np.histogram(numbers, edges)[0] for name, numbers in finite.items()}
    *earlier, last = counts
    groups = {last: counts[last]}
    for before, after in zip(earlier, [*counts][1:], strict=True):
        groups[LEFT_OUT[after]] = np.maximum(counts[before] - counts[after], 0)
    return Histogram(tuple(edges.tolist()), {name: tuple(rows.tolist()) for name, rows in groups.items() if rows.any()})


def _edges(low: float, high: float, rows: int, *, whole: bool) -> Any:
    if whole:  # edges lie between the numbers
        step = -int(-(high - low + 1) // BINS)
        return np.arange(low - 0.5, high + step, step)
    bins = min(BINS, int(2 * rows ** (1 / 3)) + 1)  # Rice's rule
    return np.linspace(low, high, bins + 1) if high > low else np.array([low - 0.5, low + 0.5])


def _first_tokens(stage: Stage, decode: Decode | None) -> tuple[FirstToken, ...]:
    """Return the most frequent first tokens; all context-free rows begin with the same distribution."""
    is_alike = set(stage.sources) == {"context-free"}
    ranked = sorted(stage.first_tokens.items(), key=lambda entry: (-entry[1], entry[0]))[:FIRST_TOKENS]
    return tuple(
        FirstToken(
            text=json.dumps(decode([token]), ensure_ascii=False) if decode else f"token {token}",
            rows=rows,
            share=rows / stage.first_tokens.total(),
            probability=stage.first_probabilities[token] / rows if is_alike else None,
        )
        for token, rows in ranked
    )


def _evenly_by_mean(stage: Stage) -> list[int]:
    """Return the places of rows to read, one from each twentieth of the rows in order of mean log-probability."""
    order = np.argsort(stage.means(), kind="stable")
    number = min(SAMPLES, len(order))
    ranks = (np.arange(number) + 0.5) * len(order) / max(1, number)
    return [int(place) for place in order[ranks.astype(int)]]
