"""Where a model moved: each figure by its definition, one row and one position at a time, in float64."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cfsd.evaluate.divergence import CHUNK, BasePredictions, score_probe
from cfsd.evaluate.movement import CONTEXT, LIKELIEST, MAX_POSITIONS, MAX_TOKENS, Movement, token_text
from cfsd.generate.spec import ProbeSpec
from cfsd.generate.stage import probe
from cfsd.machine import Machine
from cfsd.model.loading import load_model, load_tokenizer
from cfsd.statistics.bins import row_sums
from cfsd.store.artifact import Artifact, Store
from cfsd.store.tables import read_rows
from tests.conftest import fetched, save_model

ROWS = [[0, *((7 * i + j * j) % 30 for j in range(3 + 6 * i))] for i in range(11)]
MASKS = [[j > 1 and (i + j) % 3 > 0 for j in range(len(row))] for i, row in enumerate(ROWS)]
MACHINE = Machine(device="cpu", threads=1, micro_batch_tokens=200)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [save_model(tmp_path_factory.mktemp("model"), seed=seed, scale=0.2) for seed in (0, 1)]


@pytest.fixture(scope="module")
def models(folders: list[Path]) -> tuple[PreTrainedModel, PreTrainedModel]:
    base, tuned = (load_model(folder, "cpu").eval() for folder in folders)
    return base, tuned


def moved(models: tuple[PreTrainedModel, PreTrainedModel], masks: list[list[bool]] | None = None) -> Movement:
    movement = Movement(ROWS)
    BasePredictions(models[0], ROWS, 200, masks).token_nats(models[1], movement=movement)
    return movement


def by_definition(models: tuple[PreTrainedModel, PreTrainedModel]) -> list[tuple[Tensor, Tensor]]:
    """Return log p* and log p of every token but the first, T x V, of each row by itself."""
    with torch.no_grad():
        return [
            tuple(model(torch.tensor([row])).logits[0, :-1].double().log_softmax(-1) for model in models)  # type: ignore[misc]
            for row in ROWS
        ]


@pytest.mark.parametrize("masks", [None, MASKS])
def test_divergence_its_reverse_and_the_entropy_of_every_counted_token(models: Any, masks: Any) -> None:
    found = moved(models, masks).by_row()
    assert sum(map(len, found)) > CHUNK
    for row, (values, (base, tuned)) in enumerate(zip(found, by_definition(models), strict=True)):
        expected = torch.stack([
            (base.exp() * (base - tuned)).sum(-1), (tuned.exp() * (tuned - base)).sum(-1), -(base.exp() * base).sum(-1)
        ], -1)  # fmt: skip
        counted = masks[row][1:] if masks else [True] * len(expected)
        np.testing.assert_allclose(values, expected[counted], rtol=2e-4, atol=1e-6)


def test_what_tokens_of_the_vocabulary_add_is_the_whole_divergence(models: Any) -> None:
    movement = moved(models)
    assert movement.sums_3V is not None
    count = sum(len(row) - 1 for row in ROWS)
    base, tuned = (torch.cat(parts) for parts in zip(*by_definition(models), strict=True))
    expected = torch.stack([base.exp().sum(0), tuned.exp().sum(0), (base.exp() * (base - tuned)).sum(0)])
    torch.testing.assert_close(movement.sums_3V, expected, rtol=1e-4, atol=1e-5)
    kl = sum(float(values[:, 0].sum(dtype=np.float64)) for values in movement.by_row())
    assert movement.sums_3V.sum(1).tolist() == pytest.approx([count, count, kl], rel=1e-5)


def test_the_tokens_that_changed_most_come_first_on_either_side(models: Any, folders: list[Path]) -> None:
    movement = moved(models)
    assert movement.sums_3V is not None
    change = (movement.sums_3V[1] - movement.sums_3V[0]).tolist()
    found = [(row["token_id"], row["tuned_p"] - row["base_p"]) for row in movement.tokens(load_tokenizer(folders[0]))]
    risen = sorted((i for i in range(len(change)) if change[i] > 0), key=lambda i: -change[i])[:MAX_TOKENS]
    fallen = sorted((i for i in range(len(change)) if change[i] < 0), key=lambda i: change[i])[:MAX_TOKENS]
    assert [token for token, _ in found] == [*risen, *fallen]


def test_the_positions_that_moved_most_are_kept_once_for_each_context(models: Any, folders: list[Path]) -> None:
    contexts: dict[tuple[int, ...], float] = {}
    for row, (base, tuned) in zip(ROWS, by_definition(models), strict=True):
        for place, kl in enumerate((base.exp() * (base - tuned)).sum(-1).tolist(), 1):
            contexts[tuple(row[:place])] = kl
    assert len(contexts) < sum(len(row) - 1 for row in ROWS)  # all rows begin alike
    expected = sorted(contexts.values(), reverse=True)[:MAX_POSITIONS]
    tokenizer = load_tokenizer(folders[0])
    found = moved(models).positions(tokenizer, list(range(100, 100 + len(ROWS))))
    assert [item["kl"] for item in found] == pytest.approx(expected, rel=1e-4)
    for item in found:
        row, place = ROWS[item["row_id"] - 100], item["place"]
        assert item["kl"] == pytest.approx(contexts[tuple(row[:place])], rel=1e-4)
        assert item["context"] == tokenizer.decode(row[max(0, place - CONTEXT) : place])
        assert item["next"] == token_text(tokenizer, row[place])


def test_both_models_likeliest_tokens_stand_at_a_position(models: Any, folders: list[Path]) -> None:
    tokenizer, logprobs = load_tokenizer(folders[0]), by_definition(models)
    for item in moved(models).positions(tokenizer, list(range(len(ROWS)))):
        for side, own in zip(("base", "tuned"), logprobs[item["row_id"]], strict=True):
            top = own[item["place"] - 1].exp().topk(LIKELIEST)
            assert item[side] == [token_text(tokenizer, token) for token in top.indices.tolist()]
            assert item[f"{side}_p"] == pytest.approx(top.values.tolist(), rel=1e-3)
            p = float(own[item["place"] - 1].exp()[ROWS[item["row_id"]][item["place"]]])
            assert item[f"next_{side}_p"] == pytest.approx(p, rel=1e-3)


def test_an_unchanged_model_moved_nowhere(models: Any, folders: list[Path]) -> None:
    movement, tokenizer = moved((models[0], models[0])), load_tokenizer(folders[0])
    assert movement.positions(tokenizer, range(len(ROWS))) == movement.tokens(tokenizer) == []
    assert all((values[:, :2] == 0).all() for values in movement.by_row())


def test_a_token_beyond_the_tokenizer_is_called_by_its_number(folders: list[Path]) -> None:
    tokenizer = load_tokenizer(folders[0])
    assert [token_text(tokenizer, token) for token in (2, len(tokenizer))] == ["a", str(len(tokenizer))]


def scored(store: Store, folders: list[Path]) -> tuple[Artifact, Artifact]:
    base, tuned = (fetched(store, folder) for folder in folders)
    look = ProbeSpec(rows=40, length=12, seed=0)
    held = store.make("corpus", "b" * 16, lambda draft: probe(base, look, draft, MACHINE))[0]
    return held, store.make("scores", "a" * 16, lambda draft: score_probe(base, tuned, held, draft, MACHINE))[0]


def test_the_tables_of_the_probe_add_up(store: Store, folders: list[Path]) -> None:
    _, scores = scored(store, folders)
    records = read_rows(store.path(scores), "divergence")
    edges: Any = scores.metadata["entropy_edges"]
    kl, entropy = ([record[name] for record in records] for name in ("token_kl", "token_entropy"))
    sums, counts = row_sums(kl, entropy, edges)
    assert sums.sum(1) == pytest.approx([record["kl"] for record in records], rel=1e-12)
    assert counts.sum(1).tolist() == [record["count"] for record in records]
    assert np.concatenate(entropy).min() == edges[0] and np.concatenate(entropy).max() == edges[-1]
    tokens = sum(record["count"] for record in records)
    assert scores.metadata["reverse_kl"] == pytest.approx(sum(record["reverse_kl"] for record in records) / tokens)
    positions = read_rows(store.path(scores), "moved_positions")
    assert positions[0]["kl"] == pytest.approx(max(map(max, kl)))
    assert read_rows(store.path(scores), "moved_tokens")
