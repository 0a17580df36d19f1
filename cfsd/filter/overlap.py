"""Which texts share a run of words with texts that are kept for measuring.

Source: Brown et al. 2020, GPT-3, arXiv:2005.14165, section 4 and appendix C: a match is a common 13-gram of
lower-case words without punctuation, or the whole of an example that is shorter; 8 words at least.
Differs: the whole text is rejected; the paper cuts 200 characters around a match and keeps the rest.
"""

import string
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, lru_cache
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cfsd.evaluate.benchmark import Benchmark
from cfsd.evaluate.harness.score import documents
from cfsd.store.tables import batches

Hashes = np.ndarray[Any, np.dtype[np.uint64]]
Reference = Mapping[str, Iterable[str]]  # what may not be met: a name, and its texts

LEAST_WORDS = 8  # shorter reference texts are said by chance
FACTOR = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64


def reference(target: Path | None, benchmarks: Iterable[Benchmark]) -> Reference:
    """Return the texts of the target's held-out rows and of every document of each benchmark, read when iterated."""
    texts: dict[str, Iterable[str]] = {}
    if target is not None:
        texts["held-out target rows"] = _held_out(target)
    return texts | {f"benchmark {benchmark.name}": _documents(benchmark) for benchmark in benchmarks}


def _held_out(target: Path) -> Iterator[str]:

    for batch in batches(target, "held_out", ["prompt", "response"]):
        for row in batch.to_pylist():
            yield f"{row['prompt']} {row['response']}"


def _documents(benchmark: Benchmark) -> Iterator[str]:

    yield from documents(benchmark)


@cache
def _punctuation() -> dict[int, None]:
    marks = (c for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c)).startswith("P"))
    return dict.fromkeys([*map(ord, string.punctuation), *marks])


def words_of(text: str) -> list[str]:
    """Return the words of `text` in lower case, without punctuation."""
    return text.lower().translate(_punctuation()).split()


class Meeting(NamedTuple):
    """What a text has in common with a reference: which, and the words."""

    name: str
    gram: str


class Grams:
    """The runs of `size` words of all reference texts, as 64-bit hashes.

    A reference text shorter than `size` counts as one run if it has `LEAST_WORDS` (or `size`, if that is less);
    a shorter one is left out. Two different runs have equal hashes with odds of about 5e-20.
    """

    def __init__(self, texts: Reference, size: int) -> None:
        """Read all `texts`; 8 bytes are kept per run, and one entry per distinct word."""
        self.names = list(texts)
        self.vocabulary: dict[str, int] = {}
        runs: dict[int, list[tuple[int, Hashes]]] = defaultdict(list)  # by length: (index of the name, word numbers)
        for index, group in enumerate(texts.values()):
            for text in group:
                words = words_of(text)
                if len(words) >= min(size, LEAST_WORDS):
                    runs[min(size, len(words))].append((index, self._numbered(words)))
        # one random value per word, and one for all words that no reference text has
        random = np.random.default_rng(0)
        self.values: Hashes = random.integers(0, 2**64, size=len(self.vocabulary) + 1, dtype=np.uint64)
        self.runs = {length: self._indexed(runs[length], length) for length in sorted(runs, reverse=True)}

    def _numbered(self, words: list[str]) -> Hashes:
        known = self.vocabulary
        return np.array([known.setdefault(word, len(known) + 1) for word in words], np.uint64)

    def _indexed(self, texts: list[tuple[int, Hashes]], length: int) -> tuple[Hashes, Hashes]:
        """Return the sorted hashes of all runs of `length` words, and beside each the index of its name."""
        hashes = [_run_hashes(self.values[numbers], length) for _, numbers in texts]
        owners = np.repeat(np.array([index for index, _ in texts], np.uint64), [len(part) for part in hashes])
        unique, first = np.unique(np.concatenate(hashes), return_index=True)
        return unique, owners[first]

    def found(self, text: str) -> Meeting | None:
        """Return the first of the longest runs of words that `text` shares with a reference text."""
        words = words_of(text)
        numbers = np.fromiter(map(self.vocabulary.get, words, repeat(0)), np.intp, len(words))
        values = self.values[numbers]
        for length, (hashes, owners) in self.runs.items():
            if len(words) < length:
                continue
            own = _run_hashes(values, length)
            places = np.minimum(np.searchsorted(hashes, own), len(hashes) - 1)
            starts = np.flatnonzero(hashes[places] == own)
            if len(starts):
                start = int(starts[0])
                return Meeting(self.names[int(owners[places[start]])], " ".join(words[start : start + length]))
        return None

    def meets(self, text: str) -> bool:
        """Say whether `text` shares a run of words with a reference text."""
        return self.found(text) is not None


def _run_hashes(values: Hashes, length: int) -> Hashes:
    """Return one hash per run of `length` values: the sum of value t x FACTOR^t, t from the run's start."""
    powers, inverses = _powers(len(values))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values * powers)])
    hashes: Hashes = (sums[length:] - sums[:-length]) * inverses[: len(values) - length + 1]
    return hashes


@lru_cache(maxsize=1024)
def _powers(count: int) -> tuple[Hashes, Hashes]:
    """Return FACTOR^t and FACTOR^-t modulo 2^64 for t below `count`."""
    factors = ([1] + [base] * (count - 1) for base in (FACTOR, pow(FACTOR, -1, 2**64)))
    powers, inverses = (np.cumprod(np.array(factor[:count], np.uint64), dtype=np.uint64) for factor in factors)
    return powers, inverses
