"""Global batches are a function of the spec alone; the mixture lays the loss where it belongs."""

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cfsd.mix.spec import MixSpec
from cfsd.mix.stage import mix
from cfsd.model.batching import arrange, pad
from cfsd.spec import Spec
from cfsd.store.artifact import Artifact, Store, key_of
from cfsd.store.tables import TARGET, corpus_schema, read_rows, shards, table_of, write_shard
from cfsd.train.batches.global_batches import GlobalBatch, plan_batches
from cfsd.train.batches.loading import batches_of
from cfsd.train.batches.micro_batches import Row
from cfsd.train.batches.mixture import MixtureRows
from cfsd.train.spec import TrainSpec

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
        assert len(set(rows)) == len(rows)
        if following and set(rows) != set(length_of):  # not the whole corpus, which no step has twice
            waiting = next((row for row in following if row not in rows), None)
            assert waiting is None or tokens + length_of[waiting] > budget


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


def write_target(folder: Path, count: int) -> list[dict[str, Any]]:
    """Write rows of two prompt tokens, a response and an end."""
    rows = [
        {"row_id": i, "source": "target", "token_ids": [2, 3, 4 + i, 1], "supervised": [False, False, True, True],
         "prompt": "ab", "response": "c"}
        for i in range(count)
    ]  # fmt: skip
    write_shard(folder, "train", 0, table_of(TARGET, rows))
    return rows


def write_corpus(folder: Path, texts: list[tuple[str, str]], top_logprobs: int = 0, per_shard: int = 2) -> None:
    """Write a row per (source, tokens): "." a given token, "x" a sampled one."""
    rows = [
        {"row_id": i, "source": source, "token_ids": list(range(10 * i, 10 * i + len(tokens))),
         "logprobs": [None if token == "." else -1.0 for token in tokens], "finish_reason": "length", "shard": 0,
         "seed": 0, "text": "", "topk_ids": [7] * (top_logprobs * len(tokens)),
         "topk_logprobs": [-1.0] * (top_logprobs * len(tokens)), "rest_logprob": [-2.0] * len(tokens)}
        for i, (source, tokens) in enumerate(texts)
    ]  # fmt: skip
    for shard, first in enumerate(range(0, len(rows), per_shard)):
        table = table_of(corpus_schema(top_logprobs, 100), rows[first : first + per_shard])
        write_shard(folder, "corpus", shard, table)


def mixed(store: Store, folder: Path, spec: MixSpec) -> Artifact:
    return store.make("mixture", key_of("mix", spec), lambda draft: mix(folder, folder, spec, draft))[0]


TEXTS = [("context-free", ".x"), ("template", "...xx"), ("context-free", ".xxxx.xx"), ("replay", "xxx")]


@pytest.mark.parametrize("top_logprobs", [0, 3])
def test_the_mixture_supervises_responses_and_every_sampled_token(
    store: Store, tmp_path: Path, top_logprobs: int
) -> None:
    target = write_target(tmp_path, 3)
    write_corpus(tmp_path, TEXTS, top_logprobs)
    made = mixed(store, tmp_path, MixSpec(target_rows=2, rehearsal_tokens=3, seed=5))
    rows = read_rows(store.path(made), "mixture")
    assert [(row["row_id"], row["source"]) for row in rows] == [
        *((i, "target") for i in range(3)), *((i, source) for i, (source, _) in enumerate(TEXTS)),
    ]  # fmt: skip
    assert [row["token_ids"] for row in rows[:3]] == [row["token_ids"] for row in target]
    assert [row["supervised"] for row in rows[:3]] == [[False, False, True, True]] * 3
    assert [row["token_ids"][0] for row in rows[3:]] == [0, 10, 20, 30]
    assert ["".join(".x"[on] for on in row["supervised"]) for row in rows[3:]] == [tokens for _, tokens in TEXTS]
    assert {name for row in rows for name in row} == {
        "row_id", "source", "token_ids", "corpus_row", "supervised", "weight",
    }  # fmt: skip
    assert [row["corpus_row"] for row in rows] == [None] * 3 + [*range(len(TEXTS))]
    metadata: Any = made.metadata
    assert (metadata["target_rows"], metadata["target_tokens"]) == (3, 6)
    assert (metadata["rehearsal_rows"], metadata["rehearsal_tokens"]) == (4, 12)
    assert metadata["rehearsal_rows_by_source"] == {"context-free": 2, "template": 1, "replay": 1}
    assert metadata["rehearsal_tokens_by_source"] == {"context-free": 7, "template": 2, "replay": 3}


def test_a_mixture_without_rehearsal_draws_none(store: Store, tmp_path: Path) -> None:
    write_target(tmp_path, 3)
    metadata: Any = mixed(store, tmp_path, MixSpec(seed=0)).metadata
    assert (metadata["rehearsal_rows"], metadata["batch_rehearsal_tokens"], metadata["rehearsal_rows_by_source"]) == (
        0,
        0,
        {},
    )


@pytest.mark.parametrize("changed", [{"target_rows": 3}, {"rehearsal_tokens": 9}, {"seed": 6}])
def test_other_batches_are_another_mixture(store: Store, tmp_path: Path, changed: dict[str, int]) -> None:
    """Stages count what they read by its content: a training with other batches is not one that is there."""
    write_target(tmp_path, 3)
    write_corpus(tmp_path, TEXTS)
    given = MixSpec(target_rows=2, rehearsal_tokens=3, seed=5)
    one, other = (mixed(store, tmp_path, spec) for spec in (given, given.model_copy(update=changed)))
    assert one.content != other.content
    train = TrainSpec(learning_rate=1e-3)
    bare = [made.model_copy(update={"metadata": {}}) for made in (one, other)]  # which is no part of the content
    plans = [batches_of(store, made, train, 100).plan for made in bare]
    assert plans[0] != plans[1]


def test_without_rehearsal_its_tokens_make_no_other_mixture(store: Store, tmp_path: Path) -> None:
    write_target(tmp_path, 3)
    one, other = (mixed(store, tmp_path, MixSpec(rehearsal_tokens=tokens, seed=0)) for tokens in (3, 400))
    assert (one.key == other.key, one.content == other.content) == (False, True)


def test_the_mixture_is_one_table_however_it_is_cut(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards are of bounded size; their number is no part of the content."""
    write_target(tmp_path, 3)
    write_corpus(tmp_path, TEXTS * 5)
    whole = mixed(store, tmp_path, MixSpec(seed=0))
    most, batch = 100, 220
    monkeypatch.setattr("cfsd.mix.stage.SHARD_BYTES", most)
    other = Store(tmp_path / "other")
    cut = mixed(other, tmp_path, MixSpec(seed=0))
    sizes = [pq.read_table(path).nbytes for path in shards(other.path(cut), "mixture")]
    assert len(sizes) > 5 and all(size < most + batch for size in sizes)
    assert cut.content == whole.content


def test_rows_in_memory_are_those_on_disk(store: Store, tmp_path: Path) -> None:
    write_target(tmp_path, 3)
    write_corpus(tmp_path, TEXTS * 3)
    folder = store.path(mixed(store, tmp_path, MixSpec(seed=0)))
    names = ["source", "token_ids", "supervised", "weight", "corpus_row"]
    stored = [Row(**row) for row in read_rows(folder, "mixture", names)]
    rows = MixtureRows(folder)
    assert [rows[i] for i in range(len(rows))] == stored
    assert type(rows[0].token_ids[0]) is int and type(rows[0].supervised[0]) is bool and type(rows[0].weight) is float
    assert rows.sources() == [row.source for row in stored]
    assert rows.supervised_tokens() == [sum(row.supervised) for row in stored]
    corpus = read_rows(tmp_path, "corpus")
    assert [rows[3 + i].token_ids for i in range(len(corpus))] == [row["token_ids"] for row in corpus]


def test_a_bare_off_in_yaml_is_off() -> None:
    assert MixSpec.model_validate(yaml.safe_load("flow: off")) == MixSpec()


def test_recipes_without_flow_keep_their_digest() -> None:
    class Old(Spec):
        target_rows: int = 8
        rehearsal_tokens: int = 1024
        seed: int | None = None

    Old.__name__ = "MixSpec"
    assert MixSpec(seed=3).digest() == Old(seed=3).digest()
    others = [MixSpec(seed=3, flow="sample"), MixSpec(seed=3, flow="token"),
              MixSpec(seed=3, flow="sample", flow_average="row")]  # fmt: skip
    assert len({spec.digest() for spec in [MixSpec(seed=3), *others]}) == 4


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 60))
@settings(max_examples=80, deadline=None)
def test_micro_batches_hold_every_row_once_within_the_tokens(lengths: list[int], most: int) -> None:
    groups = arrange(lengths, most)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= most


def test_padding_is_to_the_right_with_zeros() -> None:
    assert pad([[1, 2, 3], [4]]).tolist() == [[1, 2, 3], [4, 0, 0]]
