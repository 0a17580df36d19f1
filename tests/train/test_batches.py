"""Which rows make a step: the order comes from seeds alone, and how often a row was seen is known."""

from collections import Counter
from itertools import pairwise
from random import Random
from typing import Any

import pytest

from cfsd.errors import BadInput
from cfsd.model.batching import arrange
from cfsd.train.batches.global_batches import GlobalBatch, Refresh, plan_batches
from cfsd.train.batches.micro_batches import Row, micro_batches_of, shared_out

TARGET, REHEARSAL = 10, 24
SOURCES = ["target"] * TARGET + ["context-free"] * REHEARSAL
LENGTHS = [3] * TARGET + [2 + i % 5 for i in range(REHEARSAL)]
TOKENS = 12


def plan(refresh: Refresh = "cycle", epochs: int = 3, **given: Any) -> list[GlobalBatch]:
    settings = {"target_rows": 4, "rehearsal_tokens": TOKENS, "epochs": epochs, "seed": 0, "refresh": refresh}
    return plan_batches(SOURCES, LENGTHS, **settings | given)


@pytest.mark.parametrize("refresh", ["cycle", "once"])
def test_every_epoch_passes_over_the_target_in_an_order_of_its_own(refresh: Refresh) -> None:
    batches = plan(refresh)
    orders = [[row for batch in batches[i : i + 3] for row in batch.target] for i in (0, 3, 6)]
    assert [len(batch.target) for batch in batches] == [4, 4, 2] * 3
    assert all(sorted(order) == list(range(TARGET)) for order in orders)
    assert all(one != two for one, two in pairwise(orders))


def test_a_batch_takes_whole_rows_while_they_fit() -> None:
    for batch in plan():
        used = sum(LENGTHS[i] for i in batch.rehearsal)
        assert TOKENS - max(LENGTHS) < used <= TOKENS
    alone = plan(rehearsal_tokens=1)
    assert all(len(batch.rehearsal) == 1 for batch in alone)  # one at least, however long


def test_cycling_sees_every_row_before_any_row_again() -> None:
    drawn = [row for batch in plan("cycle", 12) for row in batch.rehearsal]
    for turn in range(len(drawn) // REHEARSAL):
        assert len(set(drawn[turn * REHEARSAL : (turn + 1) * REHEARSAL])) == REHEARSAL
    assert drawn[:REHEARSAL] != drawn[REHEARSAL : 2 * REHEARSAL]


@pytest.mark.parametrize("tokens", [40, 95, 96, 500])
@pytest.mark.parametrize("refresh", ["cycle", "once"])
def test_no_batch_has_a_row_twice_however_large_it_is(refresh: Refresh, tokens: int) -> None:
    """A batch in which one turn of the cycle ends, and one that the whole corpus does not fill."""
    batches = plan(refresh, 12, rehearsal_tokens=tokens)
    assert all(len(set(batch.rehearsal)) == len(batch.rehearsal) for batch in batches)
    used = [sum(LENGTHS[i] for i in batch.rehearsal) for batch in batches]
    held = sum(LENGTHS[TARGET:])
    assert all(min(tokens, held) - max(LENGTHS) < count <= min(tokens, held) for count in used)  # and none is cut short
    if tokens >= held:
        assert all(len(batch.rehearsal) == REHEARSAL for batch in batches)
        views = [set(batch.views) for batch in batches]
        assert views == [{epoch} for epoch in range(36)]


def test_rows_that_wait_for_the_next_batch_keep_their_turn() -> None:
    drawn = [row for batch in plan("cycle", 24, rehearsal_tokens=70) for row in batch.rehearsal]
    for turn in range(len(drawn) // REHEARSAL):
        assert len(set(drawn[turn * REHEARSAL : (turn + 1) * REHEARSAL])) == REHEARSAL


def test_once_shows_each_epoch_the_first_ones_rows() -> None:
    batches = plan("once")
    first = [batch.rehearsal for batch in batches[:3]]
    assert [batch.rehearsal for batch in batches] == first * 3
    assert [set(batch.views) for batch in batches] == [{0}] * 3 + [{1}] * 3 + [{2}] * 3


def test_once_takes_whole_rows_that_no_other_refresh_would_take_twice() -> None:
    assert plan("once")[:3] == plan("cycle")[:3] == plan("fresh", 1)


@pytest.mark.parametrize("refresh", ["cycle", "once"])
def test_views_count_the_earlier_times_a_row_was_seen(refresh: Refresh) -> None:
    seen: Counter[int] = Counter()
    for batch in plan(refresh, 12):
        assert batch.views == [seen[row] for row in batch.rehearsal]
        seen.update(batch.rehearsal)
    assert max(seen.values()) > 1


def test_fresh_rows_are_never_seen_twice_and_running_out_is_told_with_the_remedy() -> None:
    batches = plan("fresh", 2)
    drawn = [row for batch in batches for row in batch.rehearsal]
    assert len(set(drawn)) == len(drawn) and not any(any(batch.views) for batch in batches)
    with pytest.raises(BadInput, match=r"corpus has 24 rows, but 12 steps of 12.*raise generate\.rows or lower mix"):
        plan("fresh", 4)


def test_without_rehearsal_tokens_or_rows_there_is_none_and_the_target_stays() -> None:
    batches = plan(rehearsal_tokens=0)
    assert all(batch.rehearsal == batch.views == [] for batch in batches)
    assert [batch.target for batch in batches] == [batch.target for batch in plan()]
    alone = plan_batches(["target"] * 4, [3] * 4, target_rows=2, rehearsal_tokens=9, epochs=1, seed=0, refresh="fresh")
    assert all(batch.rehearsal == [] for batch in alone)


def test_the_seed_alone_decides() -> None:
    assert plan() == plan()
    assert plan(seed=1) != plan()


@pytest.mark.parametrize("world", [2, 3, 4, 8])
@pytest.mark.parametrize("max_tokens", [1024, 4096, 16384])
def test_ranks_share_a_batch_evenly_however_much_one_of_them_could_hold(world: int, max_tokens: int) -> None:
    """In micro-batches of the largest size a batch of few rows was the first rank's alone."""
    random = Random(0)
    for target, rehearsed in ((8, 28), (16, 64), (32, 0)):
        lengths = [random.randint(40, 700) for _ in range(target)] + [64] * rehearsed
        groups = shared_out(lengths, max_tokens, world)
        assert sorted(i for group in groups for i in group) == [*range(len(lengths))]
        padded = [len(group) * max(lengths[i] for i in group) for group in groups]
        assert max(padded) <= max_tokens
        turns = [sum(padded[rank::world]) for rank in range(world)]
        assert max(turns) <= 1.5 * max(sum(turns) / world, max(lengths)), turns
        assert -(-len(groups) // world) == -(-len(arrange(lengths, max_tokens)) // world)  # no more turns


class Asked:
    """Stored distributions that count of which rows they were asked."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def at(self, rows: list[tuple[int, Any, Any]]) -> None:
        self.rows += [number for number, _, _ in rows]


def test_each_rank_makes_and_looks_up_its_own_micro_batches_alone() -> None:
    rows = [Row("context-free", [n, n, n], [True] * 3, 1.0, None, n) for n in range(14)]
    whole = micro_batches_of(rows, 6)
    for world in (1, 2, 3, 5):
        asked = [Asked() for _ in range(world)]
        shares = [micro_batches_of(rows, 6, rank=r, world=world) for r in range(world)]
        for rank, known in enumerate(asked):
            many: Any = known
            micro_batches_of(rows[:12], 6, distributions=many, rank=rank, world=world)
        assert {len(share) for share in shares} == {-(-len(whole) // world)}  # they wait for each other
        parts = [part for share in shares for part in share if part.coefficient_BT.any()]
        assert sorted(int(part.token_ids_BT[0, 0]) for part in parts) == sorted(
            int(part.token_ids_BT[0, 0]) for part in whole
        )
        assert sum(float(part.coefficient_BT.sum()) for part in parts) == pytest.approx(1)
        if 6 % world == 0:  # none waits
            assert sorted(n for known in asked for n in known.rows) == list(range(12))
