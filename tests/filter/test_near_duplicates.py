"""Near duplicates: what is rejected is judged by exact Jaccard indices computed here, pair by pair."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cfsd.filter.near_duplicates import duplicates_of
from cfsd.store.tables import CORPUS, table_of, write_shard

ORDER = 5
START, GIVEN = 0, 1


def write_corpus(folder: Path, rows: list[list[int]], per_shard: int = 10**6, prompt: int = 0) -> Path:
    """Write rows of a start token, `prompt` prompt tokens and sampled ones."""
    folder.mkdir()
    records: list[dict[str, Any]] = [
        {
            "row_id": i, "source": "context-free", "token_ids": [START, *row],
            "logprobs": [None] * (1 + prompt) + [-1.0] * (len(row) - prompt), "finish_reason": "length", "shard": 0,
            "seed": 0, "text": "",
        }
        for i, row in enumerate(rows)
    ]  # fmt: skip
    for shard, first in enumerate(range(0, len(rows), per_shard)):
        write_shard(folder, "corpus", shard, table_of(CORPUS, records[first : first + per_shard]))
    return folder


def rejected(corpus: Path, scratch: Path, threshold: float = 0.8) -> list[int]:
    found: list[int] = duplicates_of(corpus, threshold, scratch, lambda *_: None).tolist()
    return found


def jaccards(rows: list[list[int]]) -> NDArray[np.float64]:
    """Return the Jaccard index of the 5-grams of each row and each earlier one, 0 elsewhere."""
    sets = [{tuple(row[i : i + ORDER]) for i in range(len(row) - ORDER + 1)} for row in rows]
    found = np.zeros((len(rows), len(rows)))
    for later, own in enumerate(sets):
        for first, other in enumerate(sets[:later]):
            shared = len(own & other)
            found[later, first] = shared / max(1, len(own) + len(other) - shared)
    return found


def texts(count: int, seed: int = 0, length: int = 120) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randint(2, 500) for _ in range(length)] for _ in range(count)]


def changed(row: list[int], places: int, rng: random.Random) -> list[int]:
    """Return `row` with a run of `places` tokens written anew."""
    first = rng.randrange(len(row) - places)
    return [*row[:first], *(rng.randint(501, 999) for _ in range(places)), *row[first + places :]]


@pytest.fixture(scope="module")
def planted() -> list[list[int]]:
    """240 texts, and 480 variants of some of them, from equal to a fifth written anew, in a random order."""
    rng = random.Random(1)
    originals = texts(240)
    rows = originals + [changed(rng.choice(originals), rng.randint(0, 25), rng) for _ in range(480)]
    rng.shuffle(rows)
    return rows


@pytest.fixture(scope="module")
def exact(planted: list[list[int]]) -> NDArray[np.float64]:
    return jaccards(planted)


@pytest.mark.parametrize("threshold", [0.7, 0.8, 0.9, 1.0])
def test_planted_near_duplicates_are_found_and_nothing_else(
    planted: list[list[int]], exact: NDArray[np.float64], tmp_path: Path, threshold: float
) -> None:
    """What is rejected is as like a row that stays as was asked; few rows that stay are like an earlier one."""
    found = rejected(write_corpus(tmp_path / "c", planted), tmp_path, threshold)
    assert found == sorted(set(found))
    likest = (exact * ~np.isin(np.arange(len(planted)), found)).max(1)  # of the earlier rows that stay
    alike = likest >= threshold
    assert alike[found].all()
    print("RECALL", threshold, len(found), alike.sum())
    assert len(found) >= 20
    assert len(found) / alike.sum() >= 0.95


def test_how_rows_lie_in_shards_changes_nothing(
    planted: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = rejected(write_corpus(tmp_path / "whole", planted), tmp_path)
    monkeypatch.setattr("cfsd.filter.near_duplicates.BLOCK", 7)
    monkeypatch.setattr("cfsd.filter.near_duplicates.PAIR_GRAMS", 200)
    assert rejected(write_corpus(tmp_path / "cut", planted, per_shard=50), tmp_path) == whole


def test_the_first_stays_and_the_end_of_a_chain_does_too(tmp_path: Path) -> None:
    """A row that is like a rejected row only has no near duplicate among those that stay."""
    text = list(range(100, 200))
    head, both = [*range(900, 906), *text[6:]], [*range(900, 906), *text[6:94], *range(910, 916)]
    assert jaccards([text, head, both])[[1, 2, 2], [0, 1, 0]].round(2).tolist() == [0.88, 0.88, 0.78]
    corpus = write_corpus(tmp_path / "c", [text, head, both, both])
    assert rejected(corpus, tmp_path) == [1, 3]
    assert rejected(write_corpus(tmp_path / "d", [head, text, both]), tmp_path) == [1, 2]


def test_many_copies_of_one_text_leave_one(tmp_path: Path) -> None:
    rows = [row for i, row in enumerate(texts(300, seed=2)) if i < 3] * 100
    assert rejected(write_corpus(tmp_path / "c", rows), tmp_path) == list(range(3, 300))


def test_prompts_and_start_tokens_make_nothing_alike(tmp_path: Path) -> None:
    prompt = [GIVEN] * 200
    rows = [prompt + text for text in texts(40, length=30)]
    assert rejected(write_corpus(tmp_path / "c", [*rows, rows[5]], prompt=200), tmp_path) == [40]


def test_rows_too_short_for_an_n_gram_stay(tmp_path: Path) -> None:
    assert rejected(write_corpus(tmp_path / "c", [[], [7], [7], [7] * 4, [7] * 4, [7] * 5, [7] * 5]), tmp_path) == [6]
    assert rejected(write_corpus(tmp_path / "none", []), tmp_path) == []


def test_progress_reaches_the_end_and_the_scratch_is_empty_after_a_restart(tmp_path: Path) -> None:
    """A killed attempt leaves files behind: here one that would be read as bands."""
    corpus, scratch = write_corpus(tmp_path / "c", texts(1100, length=8)), tmp_path / "scratch"
    (scratch / "near-duplicates").mkdir(parents=True)
    np.zeros(10**4, np.uint64).tofile(scratch / "near-duplicates" / "band-000")
    seen: list[tuple[int, int]] = []
    assert duplicates_of(corpus, 0.8, scratch, lambda done, total: seen.append((done, total))).size == 0
    assert seen == [(512, 1100), (1024, 1100), (1100, 1100)]
    assert not list(scratch.iterdir())
