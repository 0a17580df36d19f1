"""Each rule rejects with a reason; the metadata say how rejecting biases the estimate."""

import math
import random
import shutil
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cfsd.evaluate.spec import EvaluateSpec
from cfsd.filter import stage
from cfsd.filter.spec import FilterSpec
from cfsd.filter.stage import Sums, filter_rows
from cfsd.machine import Machine
from cfsd.store.artifact import Artifact, Store, key_of
from cfsd.store.tables import CORPUS, TableWriter, batches, corpus_schema, read_rows, shards, table_of, write_shard
from tasks._planned import Planned, planning
from tasks.filter import filter_corpus

TOKENS = [[0, 5], [0, 5, 6], [0, 5, 6], [0, 7, 8, 9], [0, 5, 6, 1], [0, 5]]
NATS = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]  # -log p of every token of the row
PROSE = "One row tells of a harbour where nothing happens twice and nobody minds at all."
HARBOUR = {"the book": ["In it one row tells of a harbour where nothing happens twice, and nobody minds."]}


def row_of(
    row_id: int, tokens: list[int], nats: float | list[float], text: str = "", prompt: int = 1
) -> dict[str, Any]:
    """Return a row whose first `prompt` tokens were not sampled."""
    values = nats if isinstance(nats, list) else [nats] * (len(tokens) - prompt)
    return {
        "row_id": row_id, "source": "context-free", "token_ids": tokens,
        "logprobs": [None] * prompt + [-value for value in values], "finish_reason": "length", "shard": 0,
        "seed": 0, "text": text or str(tokens),
    }  # fmt: skip


def write_corpus(folder: Path, rows: list[dict[str, Any]], cuts: list[int] | None = None) -> Path:
    """Write `rows` as shards that end at `cuts`."""
    folder.mkdir()
    edges = [0, *(cuts or []), len(rows)]
    for shard, (first, last) in enumerate(pairwise(edges)):
        write_shard(folder, "corpus", shard, table_of(CORPUS, rows[first:last]))
    return folder


def six(folder: Path) -> Path:
    return write_corpus(folder, [row_of(i, TOKENS[i], NATS[i]) for i in range(6)], [2])


def made_from(
    store: Store, corpus: Path, spec: FilterSpec, texts: Any = None
) -> tuple[Artifact, list[int], dict[int, str]]:
    made = store.make("corpus", key_of("filter", spec), lambda draft: filter_rows(corpus, spec, draft, texts))[0]
    kept, rejected = (read_rows(store.path(made), name) for name in ("corpus", "rejects"))
    return made, [row["row_id"] for row in kept], {row["row_id"]: row["reason"] for row in rejected}


def test_nothing_is_rejected_unless_asked(store: Store, tmp_path: Path) -> None:
    made, kept, rejected = made_from(store, six(tmp_path / "corpus"), FilterSpec())
    assert kept == list(range(6))
    assert not rejected
    assert made.metadata["accepted_fraction"] == 1
    assert made.metadata["mean_logprob_shift"] == 0
    assert made.metadata["tokens"] == sum(len(tokens) - 1 for tokens in TOKENS)


@pytest.mark.parametrize(
    ("rules", "rejected"),
    [
        ({"duplicates": True}, {2: "duplicate", 5: "duplicate"}),
        ({"min_tokens": 2}, {0: "fewer than 2 tokens", 5: "fewer than 2 tokens"}),
        ({"max_tokens": 2}, {3: "more than 2 tokens", 4: "more than 2 tokens"}),
        ({"min_tokens": 2, "max_tokens": 2, "duplicates": True},
         {0: "fewer than 2 tokens", 2: "duplicate", 3: "more than 2 tokens", 4: "more than 2 tokens",
          5: "fewer than 2 tokens"}),
        ({"min_mean_logprob": -5}, {5: "mean log-probability below -5.0 nats"}),
        ({"max_mean_logprob": -2}, {0: "mean log-probability above -2.0 nats"}),
        ({"min_mean_logprob": -4, "max_mean_logprob": -1.5, "duplicates": True, "min_tokens": 2},
         {0: "fewer than 2 tokens", 2: "duplicate", 4: "mean log-probability below -4.0 nats",
          5: "fewer than 2 tokens"}),
    ],
)  # fmt: skip
def test_each_rule_rejects_its_rows_with_a_reason(
    store: Store, tmp_path: Path, rules: dict[str, Any], rejected: dict[int, str]
) -> None:
    made, kept, found = made_from(store, six(tmp_path / "corpus"), FilterSpec(**rules))
    assert found == rejected
    assert kept == [i for i in range(6) if i not in rejected]
    counts: Any = made.metadata["rejected"]
    assert counts == {reason: list(rejected.values()).count(reason) for reason in set(rejected.values())}


def test_a_copy_of_a_row_that_another_rule_rejected_is_no_duplicate(store: Store, tmp_path: Path) -> None:
    rows = [row_of(0, [0, 5, 6], 9.0), row_of(1, [0, 5, 6], 1.0), row_of(2, [0, 5, 6], 1.0)]
    spec = FilterSpec(duplicates=True, min_mean_logprob=-2)
    _, kept, rejected = made_from(store, write_corpus(tmp_path / "corpus", rows), spec)
    assert kept == [1]
    assert rejected == {0: "mean log-probability below -2.0 nats", 2: "duplicate"}


def test_given_tokens_count_neither_as_tokens_nor_in_the_mean(store: Store, tmp_path: Path) -> None:
    rows = [row_of(0, [0, 5, 6, 7], [1.0], prompt=3), row_of(1, [0, 5, 6], [1.0, 3.0]), row_of(2, [0, 5], [], prompt=2)]
    corpus = write_corpus(tmp_path / "corpus", rows)
    _, kept, rejected = made_from(store, corpus, FilterSpec(min_mean_logprob=-1.5))
    assert (kept, list(rejected)) == ([0, 2], [1])
    made, kept, rejected = made_from(store, corpus, FilterSpec(min_tokens=1))
    assert (kept, rejected) == ([0, 1], {2: "fewer than 1 tokens"})
    assert made.metadata["tokens"] == 3
    assert made.metadata["mean_logprob"] == pytest.approx(-5 / 3)


def test_texts_that_repeat_themselves_or_overlap_are_rejected(store: Store, tmp_path: Path) -> None:
    texts = [PROSE, "again and " * 20, "A text of its own, with no harbour."]
    corpus = write_corpus(tmp_path / "corpus", [row_of(i, [0, 5 + i], 1.0, text) for i, text in enumerate(texts)])
    made, kept, rejected = made_from(store, corpus, FilterSpec(repetition=True, overlap_words=10), HARBOUR)
    assert kept == [2]
    assert rejected == {0: "overlaps the book", 1: "top 2-gram above 0.2"}
    assert made.metadata["accepted_by_rule"] == {"repetition": 2 / 3, "overlap_words": 1 / 2}
    assert "said" not in made.metadata
    short = made_from(store, corpus, FilterSpec(overlap_words=10), {"one": ["four words are few"]})[0]
    assert short.metadata["said"] == ["held-back texts of fewer than 8 words, which no row was compared with: 1"]


def test_rejects_can_be_read(store: Store, tmp_path: Path) -> None:
    made, _, rejected = made_from(store, six(tmp_path / "corpus"), FilterSpec(min_tokens=3))
    for row in read_rows(store.path(made), "rejects"):
        assert row["text"] == str(TOKENS[row["row_id"]])
        assert row["source"] == "context-free"
        assert row["reason"] == rejected[row["row_id"]]


def near_corpus(folder: Path) -> Path:
    """Write a long row; one that differs at its end; and what is nearly, or just, the same as the second."""
    rng = random.Random(0)
    first = [rng.randrange(1, 500) for _ in range(100)]
    second = [*first[:90], *range(600, 608)]
    rows = [[0, *first], [0, *second], [0, *second[:-2], 700, 701], [0, *second], [0, *reversed(first[:90])]]
    return write_corpus(folder, [row_of(i, tokens, 1.0) for i, tokens in enumerate(rows)], [3])


def test_copies_count_as_exact_duplicates_and_the_rest_as_near_ones(store: Store, tmp_path: Path) -> None:
    corpus = near_corpus(tmp_path / "corpus")
    _, kept, rejected = made_from(store, corpus, FilterSpec(near_duplicates=0.8))
    assert kept == [0, 4]
    assert set(rejected.values()) == {"near duplicate"}
    _, kept, rejected = made_from(store, corpus, FilterSpec(near_duplicates=0.8, duplicates=True))
    assert kept == [0, 4]
    assert rejected == {1: "near duplicate", 2: "near duplicate", 3: "duplicate"}


def test_a_row_near_to_one_that_another_rule_rejected_is_kept(store: Store, tmp_path: Path) -> None:
    made, kept, rejected = made_from(
        store, near_corpus(tmp_path / "corpus"), FilterSpec(near_duplicates=0.8, max_tokens=99)
    )
    assert kept == [1, 4]
    assert rejected == {0: "more than 99 tokens", 2: "near duplicate", 3: "near duplicate"}
    assert made.metadata["accepted_fraction"] == 2 / 5
    assert made.metadata["accepted_by_rule"] == {"max_tokens": 4 / 5, "near_duplicates": 2 / 4}
    assert not [path for path in store.path(made).iterdir() if path.name.startswith(".")]


def test_the_facts_say_how_far_the_estimate_is_bent(store: Store, tmp_path: Path) -> None:
    made, kept, _ = made_from(store, six(tmp_path / "corpus"), FilterSpec(min_tokens=2))
    counts = [len(tokens) - 1 for tokens in TOKENS]

    def mean(rows: list[int]) -> float:
        return -sum(NATS[i] * counts[i] for i in rows) / sum(counts[i] for i in rows)

    metadata: Any = made.metadata
    assert metadata["accepted_fraction"] == len(kept) / 6
    assert metadata["tokens"] == sum(counts[i] for i in kept)
    assert math.isclose(metadata["mean_logprob"], mean(kept))
    assert math.isclose(metadata["mean_logprob_shift"], mean(kept) - mean(list(range(6))))


def test_rejecting_everything_still_says_so(store: Store, tmp_path: Path) -> None:
    made, kept, rejected = made_from(store, six(tmp_path / "corpus"), FilterSpec(min_tokens=9))
    assert not kept
    assert len(rejected) == 6
    assert made.metadata["rows"] == made.metadata["tokens"] == made.metadata["accepted_fraction"] == 0
    assert pq.read_schema(shards(store.path(made), "corpus")[0]).names == CORPUS.names


@pytest.mark.parametrize("rules", [{}, {"min_tokens": 1}, {"min_tokens": 1, "near_duplicates": 0.9}])
def test_a_corpus_without_rows_stays_one(store: Store, tmp_path: Path, rules: dict[str, Any]) -> None:
    (tmp_path / "corpus").mkdir()
    made, kept, rejected = made_from(store, tmp_path / "corpus", FilterSpec(**rules))
    assert (kept, rejected, made.metadata["rows"]) == ([], {}, 0)


def wide_table(rows: int, k: int = 4) -> pa.Table:
    """Return a corpus that stores the top k of each position, and two samples of the others."""
    rng = np.random.default_rng(0)
    plain = [row_of(i, [0, *range(5, 6 + i % 3)], 1.0) for i in range(rows)]
    sizes = [len(row["token_ids"]) for row in plain]
    wide = {
        "topk_ids": [rng.integers(0, 60_000, size * k).tolist() for size in sizes],
        "topk_logprobs": [(-rng.random(size * k)).astype(np.float16) for size in sizes],
        "rest_logprob": [(-rng.random(size)).tolist() for size in sizes],
        "tail_ids": [rng.integers(0, 60_000, size * 2).tolist() for size in sizes],
        "tail_logprobs": [(-rng.random(size * 2)).astype(np.float16) for size in sizes],
    }
    schema = corpus_schema(k, 60_000, 2)
    columns = [
        pa.array(wide[name] if name in wide else [row[name] for row in plain], kind)
        for name, kind in zip(schema.names, schema.types, strict=True)
    ]
    return pa.table(columns, schema=schema)


@pytest.mark.parametrize("rules", [{}, {"min_tokens": 2}, {"min_tokens": 2, "near_duplicates": 1.0}])
def test_every_column_is_kept(store: Store, tmp_path: Path, rules: dict[str, Any]) -> None:
    table = wide_table(9)
    (tmp_path / "corpus").mkdir()
    write_shard(tmp_path / "corpus", "corpus", 0, table)
    made, kept, _ = made_from(store, tmp_path / "corpus", FilterSpec(**rules))
    assert 0 < len(kept) <= 9
    assert pa.Table.from_batches(batches(store.path(made), "corpus")).equals(table.take(kept))


def test_shards_may_differ_in_their_columns(store: Store, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", [row_of(i, [0, 5 + i], 1.0) for i in range(3)])
    write_shard(corpus, "corpus", 1, wide_table(4))
    made, kept, _ = made_from(store, corpus, FilterSpec(min_tokens=1))
    assert kept == [0, 1, 2, 0, 1, 2, 3]
    names = [pq.read_schema(path).names for path in shards(store.path(made), "corpus")]
    assert names == [CORPUS.names, corpus_schema(4, 60_000, 2).names]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 60), max_size=6), st.integers(1, 70))
def test_the_result_does_not_depend_on_how_rows_are_batched(seed: int, cuts: list[int], size: int) -> None:
    rng = random.Random(seed)
    rows = []
    for i in range(60):
        tokens = [0, *rng.choices(range(5, 9), k=rng.randint(1, 12))]
        text = " ".join(rng.choices(PROSE.split(), k=20)) if rng.random() < 0.5 else PROSE
        rows.append(row_of(i, tokens, [rng.expovariate(1) for _ in tokens[1:]], text))
    spec = FilterSpec(
        duplicates=True, near_duplicates=0.6, min_tokens=2, max_tokens=11, min_mean_logprob=-2,
        max_mean_logprob=-0.5, repetition=True, overlap_words=10,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        whole = write_corpus(Path(folder, "whole"), rows)
        cut = write_corpus(Path(folder, "cut"), rows, sorted(cuts))
        one = made_from(Store(Path(folder, "one")), whole, spec, HARBOUR)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stage, "READ_ROWS", size)
            two = made_from(Store(Path(folder, "two")), cut, spec, HARBOUR)
    assert one == two


def test_sums_do_not_depend_on_how_rows_are_batched() -> None:
    nats, counts = np.random.default_rng(0).exponential(size=1000), np.ones(1000, np.int64)
    one, two = Sums(), Sums()
    one.add(counts, nats)
    for part in np.split(np.arange(1000), [3, 400, 999]):
        two.add(counts[part], nats[part])
    assert one == two


def test_a_table_is_cut_into_shards_of_equal_size(tmp_path: Path) -> None:
    table = table_of(CORPUS, [row_of(i, [0, 5], 1.0) for i in range(25)])
    writer = TableWriter(tmp_path, "corpus", 10)
    for batch in table.to_batches(max_chunksize=7):
        writer.add(batch)
    assert [pq.read_metadata(path).num_rows for path in shards(tmp_path, "corpus")] == [10, 10]
    writer.close()
    assert [row["row_id"] for row in read_rows(tmp_path, "corpus")] == list(range(25))


def test_a_shard_ends_with_the_batch_that_reaches_its_bytes(tmp_path: Path) -> None:
    writer = TableWriter(tmp_path, "corpus", max_bytes=100)
    batches_of_five = table_of(CORPUS, [row_of(i, [0, 5], 1.0) for i in range(25)]).to_batches(max_chunksize=5)
    for batch in batches_of_five:
        writer.add(batch)
    writer.close()
    assert [pq.read_metadata(path).num_rows for path in shards(tmp_path, "corpus")] == [5] * 5


def test_what_an_interrupted_attempt_left_is_not_in_the_result(store: Store, tmp_path: Path) -> None:
    corpus, spec = six(tmp_path / "corpus"), FilterSpec(min_tokens=2)

    def interrupted(draft: Any) -> None:
        filter_rows(corpus, FilterSpec(), draft)
        for name in ("corpus-00007.parquet", "rejects-00000.parquet", ".passed/corpus-00000.parquet"):
            (draft.folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(draft.folder / "corpus-00000.parquet", draft.folder / name)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.make("corpus", key_of("filter", spec), interrupted)
    made, kept, rejected = made_from(store, corpus, spec)
    fresh = made_from(Store(tmp_path / "other"), corpus, spec)
    assert (made, kept, rejected) == fresh


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_tokens": 5, "max_tokens": 4},
        {"min_mean_logprob": -1, "max_mean_logprob": -2},
        {"max_mean_logprob": 0.5},
        {"min_mean_logprob": -math.inf},
        {"near_duplicates": 0},
        {"near_duplicates": 1.5},
        {"overlap_words": 1},
    ],
)
def test_a_filter_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as error:
        FilterSpec(**wrong)
    assert any(str(value).removesuffix(".0") in str(error.value) for value in wrong.values())


def test_specs_of_the_first_release_keep_their_digests() -> None:
    assert FilterSpec().digest() == "e2f593bcfc320cd5"
    assert FilterSpec(duplicates=True, min_tokens=2).digest() == "957f6199086d3268"
    assert FilterSpec(repetition=True).digest() != FilterSpec().digest()


@pytest.fixture
def planned() -> Iterator[list[Planned]]:
    plan: list[Planned] = []
    token = planning.set(plan)
    yield plan
    planning.reset(token)


def test_target_and_benchmarks_count_only_where_the_spec_compares_with_them(home: Path, planned: list[Planned]) -> None:
    corpus = Artifact(kind="corpus", key="c", content="c")
    one, two = (Artifact(kind="target", key=name, content=name) for name in "tu")
    single, both = EvaluateSpec(benchmarks=("facts",)), EvaluateSpec(benchmarks=("facts", "tiny_rev"))
    few = EvaluateSpec(benchmarks=({"name": "facts", "limit": 5, "num_fewshot": 1},), held_out_rows=9)

    def keys(spec: FilterSpec) -> list[str | None]:
        planned.clear()
        for target, evaluate in ((one, single), (one, few), (two, single), (one, both)):
            filter_corpus(corpus, target, evaluate, spec, Machine())
        return [step.key for step in planned]

    assert len(set(keys(FilterSpec(duplicates=True)))) == 1
    first, limited, other_target, more_benchmarks = keys(FilterSpec(overlap_words=13))
    assert first == limited
    assert len({first, other_target, more_benchmarks}) == 3


def test_a_benchmark_that_stands_in_the_recipe_is_compared_with_too(
    home: Path, planned: list[Planned], tmp_path: Path
) -> None:
    corpus, target = (Artifact(kind=kind, key="k", content="c") for kind in ("corpus", "target"))
    (tmp_path / "rows.jsonl").write_text('{"text": "words"}\n')
    settings = {"task": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": str(tmp_path / "rows.jsonl")}}
    evaluate = EvaluateSpec.model_validate({"benchmarks": [{"task": settings}]})
    filter_corpus(corpus, target, evaluate, FilterSpec(overlap_words=13), Machine())
    assert [step.stage for step in planned] == ["filter"]
