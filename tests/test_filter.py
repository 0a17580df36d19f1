"""Each rule rejects with a reason; the facts say what rejecting did to the estimate."""

import math
from pathlib import Path
from typing import Any

import pytest

from cfsd.artifact import Artifact, Store, key_of
from cfsd.filter import FilterSpec, filter_rows
from cfsd.rows import CORPUS, read_rows, table_of, write_shard

TOKENS = [[0, 5], [0, 5, 6], [0, 5, 6], [0, 7, 8, 9], [0, 5, 6, 1], [0, 5]]
NATS = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]  # -log p of every token of the row


def write_corpus(folder: Path) -> Path:
    rows: list[dict[str, Any]] = [
        {
            "row_id": i, "source": "context-free", "token_ids": tokens,
            "logprobs": [None] + [-NATS[i]] * (len(tokens) - 1), "finish_reason": "length", "shard": 0,
            "seed": 0, "text": str(tokens),
        }
        for i, tokens in enumerate(TOKENS)
    ]  # fmt: skip
    folder.mkdir()
    write_shard(folder, "corpus", 0, table_of(CORPUS, rows[:2]))
    write_shard(folder, "corpus", 1, table_of(CORPUS, rows[2:]))
    return folder


def filtered(store: Store, tmp_path: Path, spec: FilterSpec) -> tuple[Artifact, list[int], dict[int, str]]:
    corpus = write_corpus(tmp_path / "corpus")
    made = store.make("corpus", key_of("filter", spec), lambda draft: filter_rows(corpus, spec, draft))[0]
    kept, rejected = (read_rows(store.path(made), name) for name in ("corpus", "rejects"))
    return made, [row["row_id"] for row in kept], {row["row_id"]: row["reason"] for row in rejected}


def test_nothing_is_rejected_unless_asked(store: Store, tmp_path: Path) -> None:
    made, kept, rejected = filtered(store, tmp_path, FilterSpec())
    assert kept == list(range(6))
    assert not rejected
    assert made.facts["accepted_fraction"] == 1
    assert made.facts["mean_logprob_shift"] == 0


@pytest.mark.parametrize(
    ("settings", "rejected"),
    [
        ({"duplicates": True}, {2: "duplicate", 5: "duplicate"}),
        ({"min_tokens": 2}, {0: "fewer than 2 tokens", 5: "fewer than 2 tokens"}),
        ({"max_tokens": 2}, {3: "more than 2 tokens", 4: "more than 2 tokens"}),
        ({"min_tokens": 2, "max_tokens": 2, "duplicates": True},
         {0: "fewer than 2 tokens", 2: "duplicate", 3: "more than 2 tokens", 4: "more than 2 tokens",
          5: "fewer than 2 tokens"}),
    ],
)  # fmt: skip
def test_each_rule_rejects_its_rows_with_a_reason(
    store: Store, tmp_path: Path, settings: dict[str, Any], rejected: dict[int, str]
) -> None:
    made, kept, found = filtered(store, tmp_path, FilterSpec(**settings))
    assert found == rejected
    assert kept == [i for i in range(6) if i not in rejected]
    counts: Any = made.facts["rejected"]
    assert counts == {reason: list(rejected.values()).count(reason) for reason in set(rejected.values())}


def test_the_facts_say_how_far_the_estimate_is_bent(store: Store, tmp_path: Path) -> None:
    made, kept, _ = filtered(store, tmp_path, FilterSpec(min_tokens=2))
    counts = [len(tokens) - 1 for tokens in TOKENS]

    def mean(rows: list[int]) -> float:
        return -sum(NATS[i] * counts[i] for i in rows) / sum(counts[i] for i in rows)

    facts: Any = made.facts
    assert facts["accepted_fraction"] == len(kept) / 6
    assert facts["tokens"] == sum(counts[i] for i in kept)
    assert math.isclose(facts["mean_logprob"], mean(kept))
    assert math.isclose(facts["mean_logprob_shift"], mean(kept) - mean(list(range(6))))


def test_rejecting_everything_still_says_so(store: Store, tmp_path: Path) -> None:
    made, kept, rejected = filtered(store, tmp_path, FilterSpec(min_tokens=9))
    assert not kept
    assert len(rejected) == 6
    assert made.facts["rows"] == made.facts["tokens"] == 0
