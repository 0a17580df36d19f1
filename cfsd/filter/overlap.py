"""Which texts share a run of words with texts that are held back for measuring.

Source: Brown et al. 2020, GPT-3, arXiv:2005.14165, section 4 and appendix C: a match is a common 13-gram of
lower-case words without punctuation, or the whole of an example that is shorter; 8 words at least.
Differs: the whole text is rejected; the paper removes 200 characters around a match only. Punctuation other than
apostrophes divides words, so that a special token such as <s> does not join the word beside it. Each character of
Chinese and Japanese is a word.
"""

import re
import string
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cache

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.int64]
Reference = Mapping[str, Iterable[str]]  # the texts that no row may overlap, by the name of where they come from

LEAST_WORDS = 8  # shorter reference texts occur by chance
APOSTROPHES = "'\u2019"
UNSPACED = re.compile("([\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])")  # kana, Han


@cache
def _punctuation() -> dict[int, str]:
    marks = (c for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c)).startswith("P"))
    return dict.fromkeys([*map(ord, string.punctuation), *marks], " ") | dict.fromkeys(map(ord, APOSTROPHES), "")


def words_of(text: str) -> list[str]:
    """Return the words of `text` in lower case, without punctuation."""
    return UNSPACED.sub(r" \1 ", text.lower().translate(_punctuation())).split()


def least_words(size: int) -> int:
    """Return of how many words a reference text must be to be compared by runs of `size` words."""
    return min(size, LEAST_WORDS)


def count_short(texts: Reference, size: int) -> int:
    """Return how many reference texts that are not empty have too few words to be compared."""
    return sum(0 < len(words_of(text)) < least_words(size) for group in texts.values() for text in group)


class Grams:
    """The runs of `size` words of all reference texts, as sorted 64-bit hashes: 16 bytes per run.

    A reference text shorter than `size` counts as one run if it has `LEAST_WORDS` (or `size`, if that is less);
    a shorter one is left out. Two different runs have equal hashes with odds of about 5e-20.
    """

    def __init__(self, texts: Reference, size: int) -> None:
        """Read all `texts`."""
        self.names = list(texts)
        parts: dict[int, list[tuple[int, Hashes]]] = defaultdict(list)  # by length: index of the name, hashes
        for owner, group in enumerate(texts.values()):
            for words in map(words_of, group):
                length = min(size, len(words))
                if length >= least_words(size):
                    parts[length].append((owner, _hashes(words, length)))
        self.runs = {length: _sorted(parts[length]) for length in sorted(parts, reverse=True)}

    def overlap(self, text: str) -> tuple[str, str] | None:
        """Return the first of the longest runs of words that `text` shares with a reference, after its name."""
        words = words_of(text)
        for length, (known, owners) in self.runs.items():
            own = _hashes(words, length)
            places = np.minimum(np.searchsorted(known, own), len(known) - 1)
            if len(starts := np.flatnonzero(known[places] == own)):
                start = int(starts[0])
                return self.names[owners[places[start]]], " ".join(words[start : start + length])
        return None


def _hashes(words: list[str], length: int) -> Hashes:
    """Return one hash per run of `length` words; equal within one process only."""
    runs = zip(*(words[start:] for start in range(length)), strict=False)
    return np.fromiter(map(hash, runs), np.int64)


def _sorted(parts: list[tuple[int, Hashes]]) -> tuple[Hashes, NDArray[np.int64]]:
    """Return the distinct hashes in order, and beside each the index of the first name that has it."""
    owners = np.repeat([owner for owner, _ in parts], [len(hashes) for _, hashes in parts])
    known, first = np.unique(np.concatenate([hashes for _, hashes in parts]), return_index=True)
    return known, owners[first]
