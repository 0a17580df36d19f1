"""What the sampler stored comes back where it belongs: the base's law at each rehearsal token, in any order of rows."""

import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from cfsd.data.stage import prepare
from cfsd.data.target import Target
from cfsd.errors import StoreError
from cfsd.generate.spec import TAIL_SAMPLES, GenerateSpec
from cfsd.generate.stage import generate
from cfsd.machine import Machine
from cfsd.model.loading import load_model
from cfsd.store.artifact import Artifact, Store
from cfsd.store.digests import digest_of_rows
from cfsd.store.tables import MIXTURE, corpus_schema, read_rows, shards, table_of, write_shard
from cfsd.train.batches.global_batches import GlobalBatch
from cfsd.train.batches.loading import Batches
from cfsd.train.batches.micro_batches import Row, micro_batches_of
from cfsd.train.batches.mixture import MixtureRows
from cfsd.train.batches.stored_distributions import FILE, StoredDistributions, lay_out
from cfsd.train.loss.token_loss import Stored
from tests.conftest import fetched, write_rows

MACHINE = Machine(device="cpu", threads=1, sampling_rows=8)  # several shards
ROWS, LENGTH, K = 20, 10, 6


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def base(store: Store, model_folder: Path) -> Artifact:
    return fetched(store, model_folder)


@pytest.fixture(scope="module", params=["context-free", "contextual"])
def corpus(request: pytest.FixtureRequest, store: Store, base: Artifact, tmp_path_factory: Any) -> Path:
    """Rows with their laws; contextual ones begin with a prompt, which was given."""
    rows = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")
    wanted = Target(path=str(rows), held_out=8, seed=0)
    target = store.make("target", "t" * 16, lambda draft: prepare(base, wanted, draft))[0]
    spec = GenerateSpec(rows=ROWS, length=LENGTH, seed=0, top_logprobs=K, source=request.param)
    made = store.make("corpus", request.param, lambda draft: generate(base, target, spec, draft, MACHINE))[0]
    return store.path(made)


def mixture_rows(corpus: Path) -> list[Row]:
    """Return the corpus' rows as the mixture has them: sampled tokens count."""
    rows = read_rows(corpus, "corpus", ["source", "token_ids", "logprobs"])
    return [
        Row(r["source"], r["token_ids"], [value is not None for value in r["logprobs"]], 1.0, corpus_row=number)
        for number, r in enumerate(rows)
    ]


@torch.no_grad()
def law_of(model: Any, row: Row) -> Tensor:
    law_TV: Tensor = model(torch.tensor([row.token_ids])).logits[0, :-1].log_softmax(-1)
    return law_TV[torch.tensor(row.supervised[1:])]


def by_forward_pass(model: Any, row: Row) -> Stored:
    law_TV = law_of(model, row)
    top_TK, ids_TK = law_TV.topk(K)
    next_T = torch.tensor(row.token_ids[1:])[torch.tensor(row.supervised[1:])]
    rest_T = law_TV.scatter(1, ids_TK, -torch.inf).logsumexp(1)
    return Stored(ids_TK, top_TK, rest_T, law_TV.gather(1, next_T[:, None])[:, 0])


def laid_out(corpus: Path, scratch: Path, *, top: bool = True) -> StoredDistributions:
    lay_out(corpus, scratch, top=top)
    return StoredDistributions(scratch)


def asked(rows: list[Row], places: list[int]) -> list[tuple[int, list[int], list[bool]]]:
    return [(place, rows[place].token_ids, rows[place].supervised) for place in places]


def test_every_counted_token_has_the_law_of_a_forward_pass(
    store: Store, base: Artifact, corpus: Path, tmp_path: Path
) -> None:
    model, rows = load_model(store.path(base), "cpu", "float32").eval(), mixture_rows(corpus)
    distributions, order = laid_out(corpus, tmp_path / "laws"), random.Random(0).sample(range(len(rows)), len(rows))
    assert len(rows) == ROWS and order != sorted(order)
    found = distributions.at(asked(rows, order))
    wanted = Stored(*(torch.cat(part) for part in zip(*(by_forward_pass(model, rows[i]) for i in order), strict=True)))
    assert found.ids_MK.shape == (sum(sum(row.supervised) for row in rows), K)
    assert torch.allclose(found.sampled_M, wanted.sampled_M, atol=1e-4)
    assert torch.allclose(found.rest_M, wanted.rest_M, atol=1e-4)
    assert torch.allclose(found.logprobs_MK.float(), wanted.logprobs_MK, rtol=1e-3, atol=1e-3)  # kept in float16
    same = (found.ids_MK == wanted.ids_MK).float().mean()
    assert same > 0.99  # a tie may be broken otherwise
    assert found.tail_ids_MS.shape == found.tail_logprobs_MS.shape == (len(found.ids_MK), TAIL_SAMPLES)
    law_NV = torch.cat([law_of(model, rows[i]) for i in order])
    assert torch.allclose(
        found.tail_logprobs_MS.float(), law_NV.gather(1, found.tail_ids_MS.long()), rtol=1e-3, atol=1e-3
    )
    assert not (found.tail_ids_MS[:, :, None] == found.ids_MK[:, None]).any()


def test_packs_carry_the_laws_of_their_rehearsal_rows_alone(corpus: Path, tmp_path: Path) -> None:
    rows, distributions = mixture_rows(corpus), laid_out(corpus, tmp_path / "laws")
    target = [Row("target", [0, *range(5, 5 + n)], [False, *[True] * n], 1.0) for n in (3, 14)]
    micro_batches = micro_batches_of([*target, *rows[:8]], 40, fresh=[False] * 10, distributions=distributions)
    assert len(micro_batches) > 2
    for micro_batch in micro_batches:
        counted = (micro_batch.coefficient_BT != 0) & ~micro_batch.target_BT
        assert micro_batch.stored is not None and len(micro_batch.stored.sampled_M) == int(counted.sum())
    held = sorted(
        value for micro_batch in micro_batches if micro_batch.stored for value in micro_batch.stored.sampled_M.tolist()
    )
    assert held == sorted(distributions.at(asked(rows, list(range(8)))).sampled_M.tolist())


def shuffled_mixture(corpus: Path, folder: Path) -> Path:
    """Write a target row and then the corpus' rows in another order than the corpus has."""
    rows = read_rows(corpus, "corpus", ["row_id", "source", "token_ids", "logprobs"])
    records: list[dict[str, Any]] = [{"row_id": 0, "source": "target", "token_ids": [0, 5, 6], "weight": 1.0,
                                      "supervised": [False, True, True], "corpus_row": None}]  # fmt: skip
    for number in random.Random(1).sample(range(len(rows)), len(rows)):
        row = rows[number]
        supervised = [value is not None for value in row.pop("logprobs")]
        records.append(row | {"supervised": supervised, "weight": 1.0, "corpus_row": number})
    folder.mkdir()
    write_shard(folder, "mixture", 0, table_of(MIXTURE, records))
    return folder


def without_corpus_row(mixture: Path, folder: Path) -> Path:
    """Write the table as mixtures were written before there was the column."""
    folder.mkdir()
    write_shard(folder, "mixture", 0, pq.read_table(shards(mixture, "mixture")[0]).drop_columns(["corpus_row"]))
    return folder


@pytest.mark.parametrize("old", [False, True])
def test_a_shuffled_mixture_gets_the_distributions_of_its_own_rows(corpus: Path, tmp_path: Path, *, old: bool) -> None:
    mixture = shuffled_mixture(corpus, tmp_path / "mixture")
    mixture = without_corpus_row(mixture, tmp_path / "old") if old else mixture
    distributions = laid_out(corpus, tmp_path / "laws")
    rows = MixtureRows(mixture, corpus)
    plan = [GlobalBatch([0], list(range(1, ROWS + 1)), [0] * ROWS)]
    places = {tuple(row.token_ids): number for number, row in enumerate(mixture_rows(corpus))}
    seen = []
    for micro_batch in Batches(rows, plan, 40, distributions)[0].micro_batches:
        texts = [ids[real].tolist() for ids, real in zip(micro_batch.token_ids_BT, micro_batch.real_BT, strict=True)]
        numbers = [places[tuple(text)] for text in texts if tuple(text) in places]
        wanted = distributions.at(asked(mixture_rows(corpus), numbers))
        assert micro_batch.stored is not None
        assert all(torch.equal(a, b) for a, b in zip(micro_batch.stored, wanted, strict=True))
        seen += numbers
    assert sorted(seen) == list(range(ROWS)) and seen != sorted(seen)


def test_the_place_in_the_corpus_is_no_part_of_the_content(corpus: Path, tmp_path: Path) -> None:
    new = shuffled_mixture(corpus, tmp_path / "mixture")
    old = without_corpus_row(new, tmp_path / "old")
    assert "corpus_row" in pq.read_schema(shards(new, "mixture")[0]).names
    assert digest_of_rows(shards(new, "mixture")) == digest_of_rows(shards(old, "mixture"))


def test_rows_of_a_mixture_that_the_corpus_lacks_are_refused(corpus: Path, tmp_path: Path) -> None:
    old = without_corpus_row(shuffled_mixture(corpus, tmp_path / "mixture"), tmp_path / "old")
    (tmp_path / "other").mkdir()
    distributions = laid_out(corpus, tmp_path / "laws")
    rows = MixtureRows(old, tmp_path / "other")
    with pytest.raises(StoreError, match="was mixed from another corpus"):
        Batches(rows, [GlobalBatch([0], [1, 2], [0, 0])], 40, distributions)[0]


def test_without_the_top_only_the_drawn_tokens_are_there(corpus: Path, tmp_path: Path) -> None:
    rows = mixture_rows(corpus)
    whole, lean = laid_out(corpus, tmp_path / "whole"), laid_out(corpus, tmp_path / "lean", top=False)
    found = lean.at(asked(rows, [3, 1]))
    assert torch.equal(found.sampled_M, whole.at(asked(rows, [3, 1])).sampled_M)
    assert found.ids_MK.shape == (len(found.sampled_M), 0)
    sizes = [sum(file.stat().st_size for file in (tmp_path / name).iterdir()) for name in ("whole", "lean")]
    assert sizes[1] < sizes[0] / 3


def test_no_rows_are_no_tokens(corpus: Path, tmp_path: Path) -> None:
    for top, width in ((True, K), (False, 0)):
        empty = laid_out(corpus, tmp_path / str(top), top=top).at([])
        assert empty.ids_MK.shape == empty.logprobs_MK.shape == (0, width)
        assert empty.rest_M.shape == empty.sampled_M.shape == (0,)


def test_rows_of_another_corpus_are_refused(corpus: Path, tmp_path: Path) -> None:
    rows, distributions = mixture_rows(corpus), laid_out(corpus, tmp_path / "laws")
    token_ids = [*rows[2].token_ids[:-1], 31 - rows[2].token_ids[-1]]
    for place, ids in ((2, token_ids), (3, rows[2].token_ids), (2, rows[2].token_ids[:-1])):
        with pytest.raises(StoreError, match=rf"row {place} of the corpus is not the mixture's"):
            distributions.at([(place, ids, [False] + [True] * (len(ids) - 1))])


def test_laying_out_again_over_half_a_file_gives_the_whole(corpus: Path, tmp_path: Path) -> None:
    """As after a kill: the scratch is written anew."""
    lay_out(corpus, tmp_path / "laws", top=True)
    whole = {file.name: file.read_bytes() for file in (tmp_path / "laws").iterdir()}
    (tmp_path / "laws" / FILE).write_bytes(whole[FILE][:7])
    lay_out(corpus, tmp_path / "laws", top=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "laws").iterdir()} == whole


def test_ids_of_large_vocabularies_keep_their_value(tmp_path: Path) -> None:
    wide, narrow = 200_000, 60_000
    for vocabulary, high in ((wide, 199_999), (narrow, 59_999)):
        schema, folder = corpus_schema(2, vocabulary), tmp_path / str(vocabulary)
        folder.mkdir()
        row = {"row_id": 0, "source": "context-free", "token_ids": [0, high, 7], "logprobs": [None, -1.5, -0.5]}
        row |= {"topk_ids": [0, 0, high, 1, 7, 2], "topk_logprobs": [None, None, -1.5, -2.0, -0.5, -3.0]}
        row |= {"rest_logprob": [None, -0.25, -4.0], "finish_reason": "eos", "shard": 0, "seed": 0, "text": ""}
        write_shard(folder, "corpus", 0, table_of(schema, [row]))
        found = laid_out(folder, folder / "laws").at([(0, [0, high, 7], [False, True, True])])
        assert found.ids_MK.tolist() == [[high, 1], [7, 2]]
        assert found.logprobs_MK.tolist() == [[-1.5, -2.0], [-0.5, -3.0]]
        assert found.rest_M.tolist() == [-0.25, -4.0] and found.sampled_M.tolist() == [-1.5, -0.5]
