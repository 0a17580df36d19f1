"""Two estimators of one divergence: both are zero at the base, and agree in expectation on its own samples."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from cfsd.errors import BadInput, NotFinite
from cfsd.evaluate.divergence import CHUNK, BasePredictions, check_fit, divergence, score_probe
from cfsd.generate.sampling import Rows, sample
from cfsd.generate.spec import GenerateSpec, ProbeSpec
from cfsd.generate.stage import probe
from cfsd.machine import Machine
from cfsd.model.loading import load_model
from cfsd.store.artifact import Artifact, Store, key_of
from cfsd.store.tables import read_rows
from tests.conftest import fetched, fetched_with_nan, save_model
from tests.train.test_objective import LENGTH, START, TEXTS, entropy_and_kl, log_distribution, toy

ROWS = [[0, *((7 * i + j * j) % 31 for j in range(3 + 6 * i))] for i in range(11)]
MACHINE = Machine(device="cpu", threads=1, micro_batch_tokens=200)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A base and a model whose weights are a third of the way to another."""
    folders = [save_model(tmp_path_factory.mktemp("model"), seed=seed, scale=0.2) for seed in (0, 1)]
    base, tuned = (load_model(folder, "cpu").eval() for folder in folders)
    with torch.no_grad():
        for own, far in zip(tuned.parameters(), base.parameters(), strict=True):
            own.lerp_(far, 0.7)
    return base, tuned


def by_definition(base: PreTrainedModel, tuned: PreTrainedModel, row: list[int]) -> list[float]:
    """Return the sums of KL, of -log p* and of -log p along `row`: one row at a time, all in float64."""
    with torch.no_grad():
        logits = [model(torch.tensor([row])).logits[0, :-1].double() for model in (base, tuned)]
    sums = [0.0, 0.0, 0.0]
    for at_base, at_tuned, token in zip(*(part.log_softmax(-1) for part in logits), row[1:], strict=True):
        kl = (at_base.exp() * (at_base - at_tuned)).sum()
        for i, value in enumerate((kl, -at_base[token], -at_tuned[token])):
            sums[i] += float(value)
    return sums


def test_it_is_the_sum_over_the_vocabulary_at_every_position(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    found = divergence(*models, ROWS)
    assert sum(part.num_tokens for part in found) > CHUNK
    for part, row in zip(found, ROWS, strict=True):
        kl, base_nll, tuned_nll = by_definition(*models, row)
        assert part.num_tokens == len(row) - 1
        assert (part.kl, part.base_nll, part.tuned_nll) == pytest.approx((kl, base_nll, tuned_nll), rel=1e-5)
        assert part.sampled == pytest.approx(tuned_nll - base_nll, abs=1e-4)
        assert part.kl > 0


def test_equal_models_do_not_diverge_at_all(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    assert {(part.kl, part.sampled) for part in divergence(models[0], models[0], ROWS)} == {(0.0, 0.0)}


class Flattened(LlamaForCausalLM):
    """A model whose output is more than one linear layer."""

    def forward(self, *args: Any, **named: Any) -> Any:
        """Flatten the distributions."""
        output = super().forward(*args, **named)
        output.logits = 0.9 * output.logits
        return output


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "flattened"])
def test_the_base_can_go_before_the_tuned_model_comes(family: str, tmp_path: Path) -> None:
    """What is kept of it gives the same bits; where its output is more than one linear layer, it stays."""
    kind = {"flattened": "llama"}.get(family, family)
    folders = [save_model(tmp_path / str(seed), family=kind, seed=seed) for seed in (0, 1)]
    load = Flattened.from_pretrained if family == "flattened" else AutoModelForCausalLM.from_pretrained
    base, tuned = (load(folder).eval() for folder in folders)
    rows = [[token % base.config.vocab_size for token in row[:16]] for row in ROWS]
    masks = [[place % 3 != 1 for place in range(len(row))] for row in rows]
    live, kept = (BasePredictions(base, rows, 40, masks) for _ in range(2))
    kept.keep()
    assert [part.tolist() for part in live.token_nats(tuned)] == [part.tolist() for part in kept.token_nats(tuned)]
    assert hasattr(kept, "base") == (family == "flattened") == (not kept.kept)
    assert [part.num_tokens for part in kept.divergences(tuned)] == [sum(mask[1:]) for mask in masks]
    assert {part.kl for part in kept.divergences(base)} == {0.0}


def test_it_is_not_symmetric_and_starts_from_the_base(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    base, tuned = models
    forward, backward = divergence(base, tuned, ROWS), divergence(tuned, base, ROWS)
    assert sum(p.kl for p in forward) != pytest.approx(sum(p.kl for p in backward), rel=1e-2)


def test_its_expectation_is_the_divergence_of_whole_texts() -> None:
    """Chain rule, enumerated: both forms, weighted by p*(text), are KL(base || tuned)."""
    base, tuned = toy(0), toy(1)
    probabilities = log_distribution(base).exp().tolist()
    found = divergence(base, tuned, TEXTS)
    _, kl = entropy_and_kl(base, tuned)
    for name in ("kl", "sampled"):
        mean = sum(p * getattr(part, name) for p, part in zip(probabilities, found, strict=True))
        assert mean == pytest.approx(kl, rel=1e-5)


def test_both_forms_agree_on_samples_of_the_base_and_the_dense_one_is_steadier() -> None:
    base, tuned = toy(0), toy(1)
    law = GenerateSpec(length=LENGTH, seed=0)
    rows = [s.token_ids for s in sample(base, Rows(range(4000), [[START]] * 4000, (), "probe"), law)]
    found = divergence(base, tuned, rows)
    dense, drawn = (torch.tensor([getattr(part, name) for part in found]) for name in ("kl", "sampled"))
    gap = drawn - dense
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / 4000**0.5
    assert dense.std() < drawn.std() / 2
    elsewhere = divergence(
        base, tuned, [s.token_ids for s in sample(tuned, Rows(range(4000), [[START]] * 4000, (), "probe"), law)]
    )
    gap = torch.tensor([part.sampled - part.kl for part in elsewhere])
    assert abs(float(gap.mean())) > 8 * float(gap.std()) / 4000**0.5  # on another model's texts they do not


def test_the_probe_score_is_the_mean_per_token(store: Store, model_folder: Path, tmp_path: Path) -> None:
    base, tuned = fetched(store, model_folder), fetched(store, save_model(tmp_path / "tuned", seed=1))
    look = ProbeSpec(rows=40, length=12, seed=0)
    held = store.make("corpus", key_of("probe", base, look), lambda draft: probe(base, look, draft, MACHINE))[0]
    made = store.make("scores", "a" * 16, lambda draft: score_probe(base, tuned, held, draft, MACHINE))[0]
    records = read_rows(store.path(made), "divergence")
    rows = {row["row_id"]: row for row in read_rows(store.path(held), "corpus")}
    assert [record["row_id"] for record in records] == sorted(rows)
    tokens = sum(record["count"] for record in records)
    assert made.metadata["tokens"] == tokens == held.metadata["tokens"]
    assert made.metadata["probe_kl"] == pytest.approx(sum(record["kl"] for record in records) / tokens)
    for record in records:
        assert record["base_nll"] == pytest.approx(-sum(rows[record["row_id"]]["logprobs"][1:]), abs=1e-4)


def test_a_row_that_one_model_does_not_attend_to_is_refused_by_its_name() -> None:
    models = {
        name: Artifact(kind="model", key=name, content=name, metadata={"context": context})
        for name, context in (("the base", 9), ("the tuned model", 8))
    }
    check_fit([[0] * 8, [0]], models)
    with pytest.raises(BadInput, match=r"a row of 9 tokens does not fit the tuned model, which attends to 8 tokens"):
        check_fit([[0], [0] * 9], models)


def test_a_model_that_gives_no_numbers_is_named_and_nothing_is_kept(store: Store, tmp_path: Path) -> None:
    """Beyond what the trial of a loaded model reaches; a stored NaN would end every later report."""
    base = fetched(store, save_model(tmp_path / "base", family="gpt2", seed=3))
    tuned = fetched_with_nan(store, tmp_path / "tuned", 20)
    spec = ProbeSpec(rows=8, length=30, seed=0)
    held, _ = store.make("corpus", "a" * 16, lambda draft: probe(base, spec, draft, MACHINE))
    with pytest.raises(NotFinite, match=r"kl of row \d is nan: the model's logits are not finite there"):
        store.make("scores", "b" * 16, lambda draft: score_probe(base, tuned, held, draft, MACHINE))
    assert store.find("scores", "b" * 16) is None
