"""Each limit of the table parts a text at it from one just above; shortcuts lose nothing."""

import random
from collections import Counter
from itertools import count
from string import ascii_lowercase

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfsd.filter.repetition import DUPLICATE_GRAM_CHARACTERS, TOP_GRAM_CHARACTERS, excess

WORDS = [a + b + c for a in ascii_lowercase for b in ascii_lowercase for c in ascii_lowercase]  # different ones
TOTAL = 10_000  # characters in the words of a text of n-grams


def reason(text: str) -> str | None:
    found = excess(text)
    assert found is None or found.share > found.limit
    return found.name if found else None


def lines(repeats: int, others: int, between: str = "\n") -> str:
    """Return short lines that are the same, far apart, each between two different ones."""
    return between.join([between.join(["x", WORDS[i]]) for i in range(repeats)] + WORDS[repeats:others])


def test_duplicate_lines_are_rejected_above_three_in_ten() -> None:
    assert reason(lines(4, 6)) is None  # 3 of 10
    assert reason(lines(32, 69)) == "duplicate lines"  # 31 of 101


def test_characters_of_duplicate_lines_are_rejected_above_a_fifth() -> None:
    def text(length: int) -> str:
        same, rest = "a" * length, 100 - 2 * length
        return f"{same}\n{'b' * 20}\n{same}\n{'c' * (rest - 20)}\n"

    assert reason(text(20)) is None
    assert reason(text(21)) == "characters in duplicate lines"


def test_duplicate_paragraphs_are_rejected_above_three_in_ten() -> None:
    def text(repeats: int, others: int) -> str:
        """Return paragraphs of one line that repeats, and of three lines that do not."""
        long = ["\n".join(WORDS[3 * i : 3 * i + 3]) for i in range(others)]
        return "\n\n".join(part for i, own in enumerate(long) for part in (["x"] if i < repeats else []) + [own])

    assert reason(text(4, 6)) is None  # 3 of 10
    assert reason(text(32, 69)) == "duplicate paragraphs"  # 31 of 101


def test_characters_of_duplicate_paragraphs_are_rejected_above_a_fifth() -> None:
    def text(spaces: int) -> str:
        """Return a text where spaces at the end of a line make the paragraph longer, but not the line."""
        same = "aa" + " " * spaces + "\nbb"
        others = [f"{WORDS[i] * 3}j\n{WORDS[i + 1] * 3}j" for i in (0, 2, 4)]
        return "\n\n".join([same, others[0], same, *others[1:]])

    assert reason(text(16)) is None  # 21 of 105
    assert reason(text(17)) == "characters in duplicate paragraphs"  # 22 of 107


def grams(n: int, copies: int, different: int, covered: int) -> str:
    """Return a line of TOTAL characters: n-grams, together `covered` long, each `copies` times among other words."""
    numbers, size = count(), covered // (different * n)

    def word(length: int) -> str:
        return WORDS[next(numbers)] + "-" * (length - 3)

    runs = [[word(size) for _ in range(n)] for _ in range(different)]
    runs[-1][-1] += "+" * (covered - size * n * different)
    left = TOTAL - copies * covered
    fillers = [word(20) for _ in range(left // 20 - 1)]
    fillers.append(word(left - 20 * len(fillers)))
    parts = [part for filler, run in zip(fillers, runs * copies, strict=False) for part in (filler, *run)]
    text = " ".join(parts + fillers[different * copies :])
    assert len(text.replace(" ", "")) == TOTAL
    return text


@pytest.mark.parametrize(("n", "limit"), TOP_GRAM_CHARACTERS.items())
def test_the_most_frequent_gram_is_rejected_above_its_limit(n: int, limit: float) -> None:
    most = round(limit * TOTAL / 2)  # written twice
    assert reason(grams(n, 2, 1, most)) is None
    assert reason(grams(n, 2, 1, most + 1)) == f"top {n}-gram"


@pytest.mark.parametrize(("n", "limit"), DUPLICATE_GRAM_CHARACTERS.items())
def test_duplicate_grams_are_rejected_above_their_limit(n: int, limit: float) -> None:
    most = round(limit * TOTAL)  # the first of two is no duplicate
    assert reason(grams(n, 2, 5, most)) is None
    assert reason(grams(n, 2, 5, most + 1)) == f"duplicate {n}-grams"


def shares(text: str) -> list[float]:
    """Return the 13 shares of the table over their limits, one by one and without haste."""
    found = []
    for separator in ("\n", "\n\n"):
        parts = [part.strip() for part in text.split(separator) if part.strip()]
        again = [part for i, part in enumerate(parts) if part in parts[:i]]
        found += [len(again) / max(1, len(parts)) / 0.3]
        found += [sum(map(len, again)) / max(1, sum(map(len, parts))) / 0.2]
    words = text.split()
    characters = max(1, sum(map(len, words)))
    for n, limit in (TOP_GRAM_CHARACTERS | DUPLICATE_GRAM_CHARACTERS).items():
        runs = [words[i : i + n] for i in range(len(words) - n + 1)]
        if n < 5:
            counts = Counter(" ".join(run) for run in runs)
            most = max(counts.values(), default=0)
            long = max((len(run.replace(" ", "")) for run in counts if counts[run] == most), default=0)
            found.append((most * long if most > 1 else 0) / characters / limit)
        else:
            covered = {i + j for i, run in enumerate(runs) if run in runs[:i] for j in range(n)}
            found.append(sum(len(words[i]) for i in covered) / characters / limit)
    return found


@settings(deadline=None)
@given(st.integers(0, 10**6))
def test_a_text_is_rejected_exactly_if_one_of_the_thirteen_shares_is_above_its_limit(seed: int) -> None:
    rng = random.Random(seed)
    sentences = [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(rng.randint(1, 40))]
    again = rng.choices(sentences, k=rng.randint(0, 6))
    parts = rng.sample([*sentences, *again], len(sentences) + len(again))
    text = "".join(part + rng.choice([" ", " ", "\n", "\n\n"]) for part in parts)
    over = [share for share in shares(text) if abs(share - 1) > 1e-9]
    assert (excess(text) is not None) == (max(over) > 1)


@pytest.mark.parametrize("text", ["", "   \n\n ", "one", "five words stand alone here", "句子没有空格。"])
def test_what_repeats_nothing_is_kept(text: str) -> None:
    assert excess(text) is None


def test_a_single_word_again_and_again_is_rejected() -> None:
    assert reason("yes " * 50) == "top 2-gram"
