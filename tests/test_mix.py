"""Global batches are a function of the spec alone; the mixture lays the loss where it belongs."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfsd.artifact import Store, key_of
from cfsd.batches import GlobalBatch, plan_batches
from cfsd.microbatch import arrange, pad
from cfsd.mix import MixSpec, mix
from cfsd.rows import CORPUS, TARGET, read_rows, table_of, write_shard

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def plan(target: int, rehearsal: list[int], **changed: Any) -> list[GlobalBatch]:
    """Return batches of 3 target rows of 4 tokens, and rehearsal rows of the given lengths."""
    options = {"target_rows": 3, "rehearsal_tokens": 10, "epochs": 2, "seed": 0} | changed
    return plan_batches(["target"] * target + ["context-free"] * len(rehearsal), [4] * target + rehearsal, **options)


@given(st.integers(1, 10), LENGTHS, st.integers(1, 20), st.integers(1, 3))
@settings(max_examples=80, deadline=None)
def test_every_target_row_once_per_epoch_in_batches_of_the_wanted_size(
    target: int, rehearsal: list[int], budget: int, epochs: int
) -> None:
    batches = plan(target, rehearsal, rehearsal_tokens=budget, epochs=epochs)
    per_epoch = -(-target // 3)
    assert len(batches) == epochs * per_epoch
    for epoch in range(epochs):
        own = batches[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(row for batch in own for row in batch.target) == list(range(target))
        assert all(len(batch.target) == 3 for batch in own[:-1])


@given(LENGTHS, st.integers(1, 20))
@settings(max_examples=80, deadline=None)
def test_rehearsal_fills_its_budget_and_never_exceeds_it_but_by_a_single_row(lengths: list[int], budget: int) -> None:
    length_of = dict(enumerate(lengths, start=30))
    drawn = [batch.rehearsal for batch in plan(30, lengths, rehearsal_tokens=budget)]
    for rows, following in zip(drawn, [*drawn[1:], None], strict=True):
        tokens = sum(length_of[row] for row in rows)
        assert rows
        assert tokens <= budget or len(rows) == 1
        if following:
            assert tokens + length_of[following[0]] > budget


@given(LENGTHS, st.integers(1, 20))
@settings(max_examples=80, deadline=None)
def test_rehearsal_rows_take_turns(lengths: list[int], budget: int) -> None:
    drawn = [row for batch in plan(30, lengths, rehearsal_tokens=budget) for row in batch.rehearsal]
    for first in range(0, len(drawn), len(lengths)):
        turn = Counter(drawn[first : first + len(lengths)])
        assert max(turn.values()) == 1


def test_the_plan_depends_on_nothing_but_its_arguments() -> None:
    assert plan(10, [5] * 8) == plan(10, [5] * 8)
    assert plan(10, [5] * 8) != plan(10, [5] * 8, seed=1)


def test_orders_differ_between_epochs_and_between_turns() -> None:
    batches = plan(30, [5] * 30, rehearsal_tokens=30, epochs=2)
    target = [row for batch in batches for row in batch.target]
    assert target[:30] != target[30:]
    rehearsal = [row for batch in batches for row in batch.rehearsal]
    assert rehearsal[:30] != rehearsal[30:60]


@pytest.mark.parametrize("changed", [{"rehearsal": []}, {"rehearsal": [5] * 8, "rehearsal_tokens": 0}])
def test_without_rehearsal_the_target_batches_stay_the_same(changed: dict[str, Any]) -> None:
    plain = plan(10, **changed)
    assert all(batch.rehearsal == [] for batch in plain)
    assert [batch.target for batch in plain] == [batch.target for batch in plan(10, [5] * 8)]


def test_the_rehearsal_does_not_depend_on_how_many_epochs_follow() -> None:
    assert plan(10, [5] * 8, epochs=3)[:4] == plan(10, [5] * 8, epochs=1)


def test_the_mixture_supervises_responses_and_every_sampled_token(store: Store, tmp_path: Path) -> None:
    targets = [
        {"row_id": i, "source": "target", "token_ids": [2, 3, 4, 1], "supervised": [False, False, True, True],
         "prompt": "ab", "response": "c"}
        for i in range(3)
    ]  # fmt: skip
    corpus = [
        {"row_id": i, "source": "context-free", "token_ids": [0, 5, 6][: i + 2],
         "logprobs": [None, -1.0, -1.0][: i + 2], "finish_reason": "length", "shard": 0, "seed": 0, "text": ""}
        for i in range(2)
    ]  # fmt: skip
    write_shard(tmp_path, "train", 0, table_of(TARGET, targets))
    write_shard(tmp_path, "corpus", 0, table_of(CORPUS, corpus))
    spec = MixSpec(target_rows=2, rehearsal_tokens=3, seed=5)
    made = store.make("mixture", key_of("mix", spec), lambda draft: mix(tmp_path, tmp_path, spec, draft))[0]
    rows = read_rows(store.path(made), "mixture")
    assert [row["token_ids"] for row in rows] == [r["token_ids"] for r in (*targets, *corpus)]
    assert [row["supervised"] for row in rows[3:]] == [[False, True], [False, True, True]]
    assert [row["supervised"] for row in rows[:3]] == [[False, False, True, True]] * 3
    assert made.facts["target_tokens"] == 6
    assert made.facts["rehearsal_tokens"] == 3
    assert made.facts["rehearsal_rows"] == 2


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 60))
@settings(max_examples=80, deadline=None)
def test_micro_batches_hold_every_row_once_within_the_tokens(lengths: list[int], most: int) -> None:
    groups = arrange(lengths, most)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= most


def test_padding_is_to_the_right_with_zeros() -> None:
    assert pad([[1, 2, 3], [4]]).tolist() == [[1, 2, 3], [4, 0, 0]]
