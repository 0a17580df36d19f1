"""Geometric-median matching: it finds the bulk under planted corruption, and the stage keeps rows whole."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.optimize import minimize

from cfsd.data.corpus_table import HALVED, corpus_metadata
from cfsd.errors import BadInput
from cfsd.select.geometric_median import MAX_STEPS, geometric_median, match
from cfsd.select.spec import SelectSpec, selects
from cfsd.select.stage import select
from cfsd.store.artifact import Artifact, Draft, Store, key_of
from cfsd.store.tables import CORPUS, batches, read_rows, shards, table_of, write_shard

Array = np.ndarray[Any, Any]
ROWS, WIDTH, KEPT = 400, 32, 80


def unit(rng: np.random.Generator) -> Array:
    direction = rng.normal(size=WIDTH)
    return direction / np.linalg.norm(direction)


def planted(kind: str, fraction: float, seed: int) -> tuple[Array, Array]:
    """Return points of two clean clusters far from the origin, and which of them were replaced."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(ROWS, WIDTH)) + 10 * unit(rng)
    points[::2] += 2 * unit(rng)
    bad = np.zeros(ROWS, dtype=bool)
    bad[rng.choice(ROWS, int(fraction * ROWS), replace=False)] = True
    turn = np.arange(ROWS) % 2 == 0
    far = bad & (turn if kind == "both" else kind == "far")
    points[far] += 25 * unit(rng)
    points[bad & ~far] += rng.normal(size=(int((bad & ~far).sum()), WIDTH)) * 5
    return points.astype(np.float32), bad


def measured(points: Array, bad: Array, chosen: Any) -> tuple[float, float]:
    """Return the share of bad rows among the chosen, and how far their mean is from that of the clean."""
    distance = np.linalg.norm(points[chosen].mean(0) - points[~bad].mean(0))
    return float(bad[chosen].mean()), float(distance)


def herding(points: Array, center: Array, k: int) -> list[int]:
    """The pick by inner product alone, as the paper writes it."""
    direction, left = center.copy(), np.ones(len(points), dtype=bool)
    picked: list[int] = []
    for _ in range(k):
        picked.append(int(np.argmax(np.where(left, points @ direction, -np.inf))))
        left[picked[-1]] = False
        direction += center - points[picked[-1]]
    return picked


@pytest.mark.parametrize("kind", ["far", "noise", "both"])
@pytest.mark.parametrize("fraction", [0.2, 0.45])
def test_under_planted_corruption_it_wins_against_random_choice(kind: str, fraction: float) -> None:
    ours, chance = [], []
    for seed in range(8):
        points, bad = planted(kind, fraction, seed)
        ours.append(measured(points, bad, match(points, geometric_median(points).point, KEPT)))
        drawn = np.random.default_rng(seed).choice(ROWS, KEPT, replace=False)
        chance.append(measured(points, bad, drawn))
    assert np.all(np.array(ours) < np.array(chance))  # share and distance, in every draw
    assert np.all(np.mean(ours, 0) < 0.7 * np.mean(chance, 0))


def test_the_inner_product_alone_would_take_the_noise() -> None:
    points, bad = planted("noise", 0.4, 0)
    center = geometric_median(points).point
    assert bad[herding(points, center, KEPT)].mean() > 0.9
    assert bad[match(points, center, KEPT)].mean() < 0.1


def test_the_median_has_the_least_sum_of_distances() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(60, 5)) * [1, 2, 3, 4, 5] + 7
    points[:25] += 40

    def distances(point: Array) -> tuple[float, Array]:
        apart = point - points
        length = np.linalg.norm(apart, axis=1)
        return float(length.sum()), (apart / length[:, None]).sum(0)

    found = geometric_median(points)
    best = minimize(distances, points.mean(0), jac=True, options={"gtol": 1e-9})
    assert found.steps < MAX_STEPS
    assert distances(found.point)[0] <= best.fun * (1 + 1e-10)
    assert np.allclose(found.point, best.x, atol=1e-4)
    assert not np.allclose(found.point, points.mean(0), atol=5)  # the mean is elsewhere


@pytest.mark.parametrize("points", [np.ones((5, 3)), np.zeros((1, 3)), np.array([[0.0], [0.0], [0.0], [9.0]])])
def test_the_median_may_be_one_of_the_points(points: Array) -> None:
    assert np.allclose(geometric_median(points).point, points[0], atol=1e-6)


def test_the_median_moves_with_the_points() -> None:
    points, _ = planted("both", 0.3, 0)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(WIDTH, WIDTH)))[0]
    here = geometric_median(points.astype(float)).point
    assert np.allclose(geometric_median(points + 100.0).point, here + 100, atol=1e-5)
    assert np.allclose(geometric_median(points.astype(float) @ rotation * 3).point, here @ rotation * 3, atol=1e-5)


def test_the_choice_depends_on_neither_origin_nor_scale_nor_order() -> None:
    points = planted("both", 0.3, 0)[0].astype(float)
    center = geometric_median(points).point
    chosen = match(points, center, KEPT)
    assert match(points + 100, center + 100, KEPT) == chosen
    assert match(points * 3, center * 3, KEPT) == chosen
    order = np.random.default_rng(1).permutation(ROWS)
    assert [int(order[i]) for i in match(points[order], center, KEPT)] == chosen


def test_the_mean_nears_the_centre_as_one_over_k() -> None:
    sizes = [8, 16, 32, 64, 128, 256]
    errors: dict[str, list[list[float]]] = {"match": [], "random": []}
    for seed in range(4):
        rng = np.random.default_rng(seed)
        points = rng.normal(size=(4000, 16))
        points[:, 0] **= 2
        center, mean = geometric_median(points).point, points.mean(0)
        ours, chance = match(points, center, sizes[-1]), rng.permutation(len(points))
        errors["match"].append([float(np.linalg.norm(points[ours[:k]].mean(0) - center)) for k in sizes])
        errors["random"].append([float(np.linalg.norm(points[chance[:k]].mean(0) - mean)) for k in sizes])
    rate = {name: np.polyfit(np.log(sizes), np.log(found).mean(0), 1)[0] for name, found in errors.items()}
    assert -1.15 < rate["match"] < -0.85
    assert -0.65 < rate["random"] < -0.35


def test_of_equal_points_the_first_is_taken() -> None:
    points = np.tile(np.random.default_rng(0).normal(size=(50, 33)).astype(np.float32), (3, 1))[:149]
    chosen = match(points, geometric_median(points).point, 100)
    for copy in chosen:
        earlier = [i for i in (copy - 50, copy - 100) if i >= 0]
        assert all(i in chosen[: chosen.index(copy)] for i in earlier)


def test_choosing_all_takes_each_once_and_leaves_the_centre_alone() -> None:
    points, _ = planted("both", 0.3, 0)
    center = geometric_median(points).point
    before = center.copy()
    assert sorted(match(points, center, ROWS)) == list(range(ROWS))
    assert np.array_equal(center, before)


def test_a_memory_map_gives_the_same_choice(tmp_path: Path) -> None:
    points, _ = planted("far", 0.3, 0)
    np.save(tmp_path / "points.npy", points)
    mapped = np.load(tmp_path / "points.npy", mmap_mode="r")
    there, here = geometric_median(mapped), geometric_median(points)
    assert np.array_equal(there.point, here.point)
    assert match(mapped, there.point, KEPT) == match(points, here.point, KEPT)


def corpus(store: Store, count: int = 10, shard: int = 7) -> Artifact:
    """A corpus with a column more than the contract asks for; row i has i sampled tokens of -i nats, at most 20."""
    rows: list[dict[str, Any]] = [
        {
            "row_id": 100 + i, "source": "context-free", "token_ids": [0, 9, *[5] * min(i, 20)],
            "logprobs": [None, None, *[-float(i)] * min(i, 20)], "finish_reason": "eos" if i % 2 else "length",
            "shard": 0, "seed": 0, "text": str(i),
        }
        for i in range(1, count + 1)
    ]  # fmt: skip
    table = table_of(CORPUS, rows)
    more = pa.array([[i % 99] * 2 for i in range(count)], pa.list_(pa.uint16()))

    def write(draft: Draft) -> None:
        for index, first in enumerate(range(0, count, shard)):
            part = table.append_column("topk_ids", more)[first : first + shard]
            note = {} if index else {HALVED: b"2"}  # which holds for that shard alone
            write_shard(draft.folder, "corpus", index, part.replace_schema_metadata(note))
        draft.metadata |= corpus_metadata(draft.folder)
        draft.metadata |= {"biased": "temperature=0.7", "rejected": {"duplicate": 1}, "top_logprobs": 2}

    return store.make("corpus", key_of("made up", count), write)[0]


def selected(store: Store, rows: Artifact, spec: SelectSpec, vectors: Array | None = None) -> Artifact:
    key = key_of("select", rows, spec.used_on(rows.kind))
    return store.make(rows.kind, key, lambda draft: select(rows, spec, draft, vectors))[0]


def test_the_rows_chosen_keep_their_order_and_all_their_columns(store: Store) -> None:
    rows = corpus(store)
    vectors = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    chosen = match(vectors, geometric_median(vectors).point, 5)
    assert chosen != sorted(chosen)
    made = selected(store, rows, SelectSpec(corpus_rows=5), vectors)
    before, after = (read_rows(store.path(a), "corpus") for a in (rows, made))
    assert after == [before[i] for i in sorted(chosen)]
    table = next(batches(store.path(made), "corpus"))
    assert table.schema.field("topk_ids").type == pa.list_(pa.uint16())


def test_the_facts_say_what_was_chosen_and_how_far_the_estimate_is_bent(store: Store) -> None:
    rows = corpus(store)
    made = selected(store, rows, SelectSpec(corpus_rows=4, method="random", seed=3))
    chosen = [int(row["text"]) for row in read_rows(store.path(made), "corpus")]

    def mean(numbers: list[int]) -> float:
        return -sum(i * i for i in numbers) / sum(numbers)

    metadata: Any = dict(made.metadata)
    assert metadata.pop("mean_logprob") == pytest.approx(mean(chosen))
    assert metadata.pop("mean_logprob_shift") == pytest.approx(mean(chosen) - mean(list(range(1, 11))))
    assert metadata == {
        "selected": 4, "of": 10, "method": "random", "biased": "temperature=0.7", "top_logprobs": 2, "rows": 4,
        "tokens": sum(chosen), "ended_fraction": sum(i % 2 for i in chosen) / 4, "accepted_fraction": 0.4,
    }  # fmt: skip


def test_random_choice_is_seeded_and_grows_by_adding(store: Store) -> None:
    rows = corpus(store)

    def chosen(k: int, seed: int) -> list[int]:
        made = selected(store, rows, SelectSpec(corpus_rows=k, method="random", seed=seed))
        return [row["row_id"] for row in read_rows(store.path(made), "corpus")]

    small, large = chosen(3, 0), chosen(6, 0)
    assert set(small) < set(large) and large == sorted(large)
    assert len({tuple(chosen(3, seed)) for seed in range(6)}) > 3


def test_a_choice_over_many_shards_keeps_the_order(store: Store) -> None:
    rows = corpus(store, 30_000, shard=3000)
    made = selected(store, rows, SelectSpec(corpus_rows=20_000, method="random", seed=0))
    assert len(shards(store.path(made), "corpus")) == 2
    ids = [row["row_id"] for row in read_rows(store.path(made), "corpus", ["row_id"])]
    assert len(ids) == 20_000 and ids == sorted(ids)


def test_sources_with_other_columns_stay_apart(store: Store) -> None:
    row: dict[str, Any] = {"row_id": 0, "source": "replay", "token_ids": [0, 3], "logprobs": [None, -1.0]}
    plain = table_of(CORPUS, [row | {"row_id": i} for i in range(6)])
    more = plain.append_column("rest_logprob", pa.array([[None, -0.5]] * 6, pa.list_(pa.float32())))

    def write(draft: Draft) -> None:
        for index, table in enumerate([plain, more, more]):
            write_shard(draft.folder, "corpus", index, table)
        draft.metadata |= corpus_metadata(draft.folder)

    rows = store.make("corpus", key_of("two sources"), write)[0]
    made = selected(store, rows, SelectSpec(corpus_rows=15, method="random", seed=0))
    columns = [batch.schema.names for batch in batches(store.path(made), "corpus")]
    assert columns == [plain.schema.names, more.schema.names]
    assert sum(batch.num_rows for batch in batches(store.path(made), "corpus")) == 15


def test_more_rows_than_there_are_is_refused(store: Store) -> None:
    with pytest.raises(BadInput, match=r"corpus_rows is 11, but the corpus has 10 rows"):
        selects(SelectSpec(corpus_rows=11), corpus(store))


@pytest.mark.parametrize(
    ("settings", "rows", "wanted"),
    [({}, 10, False), ({"target_rows": 5}, 10, False), ({"corpus_rows": 10}, 10, False), ({"corpus_rows": 9}, 10, True),
     ({"corpus_rows": 9}, 0, False), ({"corpus_rows": 9}, None, True)],
)  # fmt: skip
def test_nothing_happens_unless_rows_are_left_out(settings: dict[str, Any], rows: int | None, wanted: bool) -> None:
    metadata = {"made_by": "filter"} if rows is None else {"rows": rows}
    made = Artifact(kind="corpus", key="", content="", metadata=metadata)
    assert selects(SelectSpec(**settings), made) == wanted


def test_what_is_not_used_is_not_in_the_key() -> None:
    def key(kind: str, **settings: Any) -> str:
        return SelectSpec(**settings).used_on(kind).digest()

    assert key("target", target_rows=5, corpus_rows=3, seed=1) == key("target", target_rows=5)
    assert key("corpus", target_rows=5, corpus_rows=3, seed=1) == key("corpus", corpus_rows=3)
    assert key("corpus", corpus_rows=3, method="random", seed=1) != key("corpus", corpus_rows=3, method="random")
    assert key("corpus", corpus_rows=3) != key("corpus", corpus_rows=4)
