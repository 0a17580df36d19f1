"""At the base's own weights nothing diverges and nothing pulls: base and model are one function, in every precision.

The models have their families' default dropout and are in training mode. Gradients are compared with the likelihood's
on the same rows.
"""

import copy
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from cfsd.model.loading import halve_layers
from cfsd.store.artifact import Store
from cfsd.train import trainer
from cfsd.train.adapters import adapt
from cfsd.train.batches.micro_batches import MicroBatch, Row
from cfsd.train.dropout import has_dropout, turn_off_dropout
from cfsd.train.loss.objective import Objective, losses
from cfsd.train.methods import Methods
from cfsd.train.methods.method import TrainedAdapter
from cfsd.train.spec import RehearsalSpec, TrainSpec
from tests.conftest import save_model, write_rows
from tests.train.test_objective import BUCKET, LIVE, NLL, SAMPLED, TEXTS, cut, every_text, rehearsal
from tests.train.test_train import World, figures, signals_given_back, spec_with, trained, world, world_in

pytestmark = pytest.mark.processes
__all__ = ["signals_given_back", "world"]
VOCABULARY, STORED = 4, 2  # tokens, and how many likeliest of them are stored
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def model_of(family: str) -> Any:
    """Return a random model with its family's default dropout; Falcon, which has none by default, with some."""
    torch.manual_seed(0)
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **SIZES))
    sizes = SIZES | {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if family == "opt":
        return OPTForCausalLM(OPTConfig(ffn_dim=32, word_embed_proj_dim=16, init_std=0.3, **sizes))
    if family == "falcon":  # reads its probabilities from the config as it goes
        return FalconForCausalLM(FalconConfig(hidden_dropout=0.1, attention_dropout=0.1, **sizes))
    return LlamaForCausalLM(LlamaConfig(intermediate_size=32, initializer_range=0.5, **sizes))


@pytest.mark.parametrize("rehearsal", [{"loss": "nll"}, {"loss": "kl", "reference": "base"}])
def test_frozen_layers_in_bfloat16_train_the_same_adapter(
    world: World, monkeypatch: pytest.MonkeyPatch, rehearsal: dict[str, Any]
) -> None:
    """Held in 32 bits they were cast anew in every pass, and the cast was kept: six bytes a weight in place of two."""
    spec = spec_with(methods={"lora": {"rank": 4}}, precision="bfloat16", rehearsal=rehearsal)
    key = rehearsal["loss"]
    halved = []
    halve = trainer.halve_layers
    monkeypatch.setattr(trainer, "halve_layers", lambda model: (halve(model), halved.append(held_in_16_bits(model))))
    small = trained(world, f"small {key}", world.mixture, spec)
    monkeypatch.setattr(TrainedAdapter, "halves", lambda *_: False)
    whole = trained(world, f"whole {key}", world.mixture, spec)
    for file in ("adapter/adapter_model.safetensors", "model.safetensors"):
        assert (world.store.path(small) / file).read_bytes() == (world.store.path(whole) / file).read_bytes()
    assert halved and min(halved) > 0.5


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_beside_an_adapter_the_model_is_its_own_base(family: str, bfloat16: bool) -> None:
    """A second copy of frozen weights was held: of 8B weights in 4 bits 5 GB, in 16 bits 16 GB."""
    micro_batches = cut(rehearsal(TEXTS), 400, model_of(family), STORED, torch.float16)
    found = []
    for own in (True, False):
        model = model_of(family).train()
        copied = copy.deepcopy(model).eval().requires_grad_(False)
        torch.manual_seed(1)
        adapted = adapt(Methods.model_validate({"lora": {"rank": 3, "dropout": 0.3}}), model)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        objective = Objective(model, LIVE, model if own else copied)
        nats = _backward(model, micro_batches, bfloat16)
        objective.remove()
        found.append((nats, [p.grad for p in adapted.parameters() if p.requires_grad]))
    (own_nats, own_grads), (nats, grads) = found
    assert own_nats == nats > 0.01
    assert all(torch.equal(one, other) for one, other in zip(own_grads, grads, strict=True))


def held_in_16_bits(model: Any) -> float:
    """Return the share of the frozen weights that take two bytes."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    return sum(p.numel() for p in frozen if p.dtype == torch.bfloat16) / sum(p.numel() for p in frozen)


class AtBase(NamedTuple):
    nats: float  # per token
    gradient: Tensor


def at_base(family: str, spec: RehearsalSpec, rows: list[Row], bfloat16: bool) -> AtBase:
    """Return the rehearsal's loss per token, and its gradient, of a model in training that is the base itself."""
    model = model_of(family).train()
    base = copy.deepcopy(model).eval().requires_grad_(False)
    micro_batches = cut(rows, 400, copy.deepcopy(base), STORED, torch.float16)
    objective = Objective(model, spec, base)
    if bfloat16:
        halve_layers(base)
    torch.manual_seed(1)
    nats = _backward(model, micro_batches, bfloat16)
    objective.remove()
    return AtBase(nats, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))


def _backward(model: Any, micro_batches: list[MicroBatch], bfloat16: bool) -> float:
    total = 0.0
    for micro_batch in micro_batches:
        with torch.autocast("cpu", torch.bfloat16) if bfloat16 else nullcontext():
            parts = losses(model, micro_batch)
        parts.loss.backward()  # type: ignore[no-untyped-call]
        total += float(parts.loss.detach())
    return total


def share_of_likelihood(family: str, spec: RehearsalSpec, rows: list[Row], bfloat16: bool) -> tuple[float, float]:
    """Return the nats per token at the base, and the gradient's norm as a share of the likelihood's."""
    found, likelihood = (at_base(family, form, rows, bfloat16) for form in (spec, NLL))
    plain = at_base(family, NLL, rehearsal(TEXTS), bfloat16)
    scale = likelihood.gradient.norm() if rows == rehearsal(TEXTS) else plain.gradient.norm()
    return found.nats, float(found.gradient.norm() / scale)


FAMILIES = ["gpt2", "opt", "falcon", "llama"]
PRECISIONS = pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])


@PRECISIONS
@pytest.mark.parametrize("family", FAMILIES)
def test_the_live_base_is_the_model_itself(family: str, bfloat16: bool) -> None:
    """To the last bit, in bfloat16 too, since both round alike: Adam would take a step by the sign of a last bit."""
    found = at_base(family, LIVE, rehearsal(TEXTS), bfloat16)
    assert found.nats == 0
    assert not found.gradient.any()


@PRECISIONS
@pytest.mark.parametrize("family", FAMILIES)
def test_the_stored_base_is_the_model_within_its_number_format(family: str, bfloat16: bool) -> None:
    """Stored in float16 from a pass in float32: under autocast the model's own rounding comes on top."""
    for spec, rows in ((BUCKET, rehearsal(TEXTS)), (SAMPLED, every_text(model_of(family).eval()))):
        nats, gradient = share_of_likelihood(family, spec, rows, bfloat16)  # sampled: in expectation
        assert abs(nats) < (2e-3 if bfloat16 else 1e-4)
        assert gradient < (0.1 if bfloat16 else 2e-3)


def test_target_rows_in_the_same_pass_change_nothing() -> None:
    """They would lie in the same packed products as the trained model's rehearsal rows, but not in the base's."""
    target = [Row("target", text, [False, True, True, True], 0.0) for text in TEXTS[:9]]
    for family in FAMILIES:
        found = at_base(family, LIVE, [*target, *rehearsal(TEXTS)], bfloat16=True)
        assert found.nats == 0 and not found.gradient.any()


def test_a_base_in_another_format_would_be_noticed() -> None:
    """As it was: all weights in bfloat16, against autocast of float32."""
    model = model_of("llama").train()
    base = copy.deepcopy(model).bfloat16().eval().requires_grad_(False)
    Objective(model, LIVE, base)
    assert _backward(model, cut(rehearsal(TEXTS), 400), bfloat16=True) > 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_halved_layers_compute_the_same_bits_under_autocast(family: str) -> None:
    whole = model_of(family).eval()
    halved = copy.deepcopy(whole).requires_grad_(False)
    halve_layers(halved)
    smaller = any(p.dtype == torch.bfloat16 for p in halved.parameters())
    assert smaller == (family in ("opt", "llama"))  # the others have linear layers of their own classes
    assert halved.get_input_embeddings().weight.dtype == torch.float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(whole(torch.tensor(TEXTS)).logits, halved(torch.tensor(TEXTS)).logits)


# dropout


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_is_found_and_turned_off_for_a_time(family: str) -> None:
    model = model_of(family).train()
    before = model.config.to_dict()
    assert has_dropout(model) == (family != "llama")
    state = torch.get_rng_state()
    put_back = turn_off_dropout(model)
    assert not has_dropout(model) and torch.equal(state, torch.get_rng_state())
    with torch.no_grad():
        one, two = (model(torch.tensor(TEXTS)).logits for _ in range(2))
        assert torch.equal(one, two) and torch.equal(one, model.eval()(torch.tensor(TEXTS)).logits)
    put_back()
    assert has_dropout(model) == (family != "llama") and model.config.to_dict() == before


def test_only_no_dropout_can_be_asked_for() -> None:
    with pytest.raises(
        ValueError, match=r"0\.1 would be one number for places.*allowed: empty, the model's own, and 0"
    ):
        TrainSpec(dropout=0.1)
    with pytest.raises(ValueError, match=r"dropout 0 turns all dropout off, but methods\.lora\.dropout is 0\.2"):
        TrainSpec.model_validate({"dropout": 0, "methods": {"lora": {"rank": 2, "dropout": 0.2}}})
    assert TrainSpec(dropout=0).digest() != TrainSpec().digest()


# a whole training, as it is started


@pytest.fixture(scope="module")
def dropping(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("dropping")
    model = save_model(folder / "model", family="gpt2")
    return world_in(Store(folder / "data"), model, write_rows(folder / "rows.jsonl", count=48))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [None, 0])
def test_a_training_begins_at_no_divergence(dropping: World, precision: str, dropout: float | None) -> None:
    rehearsed = {"loss": "kl", "reference": "base"}
    given: dict[str, Any] = {"precision": precision, "dropout": dropout, "epochs": 1}
    name = f"{precision} {dropout}"
    model = trained(dropping, name, dropping.mixture, spec_with(rehearsal=rehearsed, **given))
    assert figures(dropping, model, "train/divergence")[1] == 0
    kept = json.loads((dropping.store.path(model) / "config.json").read_text())
    assert kept["attn_pdrop"] == kept["resid_pdrop"] == kept["embd_pdrop"] == 0.1
    said = model.metadata.get("said", [])
    assert ("rehearsal rows pass the model apart" in str(said)) == (dropout is None)


def test_without_dropout_the_pull_of_the_base_is_nothing_at_the_first_step(dropping: World) -> None:
    """A hundred times the weight: what gradient there is, is the target's."""
    norms = []
    for weight in (0.0, 100.0):
        spec = spec_with(
            precision="bfloat16", dropout=0, epochs=1, rehearsal={"loss": "kl", "reference": "base", "weight": weight}
        )
        model = trained(dropping, f"pull {weight}", dropping.mixture, spec)
        norms.append(figures(dropping, model, "train/gradient_norm")[1])
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_a_small_corpus_is_rehearsed_once_a_step_and_that_is_said(tmp_path: Path) -> None:
    there = Store(tmp_path / "data"), save_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")
    little = world_in(*there, corpus_rows=4)
    model = trained(little, "small", little.mixture)
    held = little.mixture.metadata["rehearsal_tokens"]
    (line,) = model.metadata["said"]  # type: ignore[misc]
    assert f"each step rehearses the whole corpus once, {held} tokens in 4 rows" in str(line)
    assert "mix.rehearsal_tokens asks for 96" in str(line) and "raise generate.rows" in str(line)
    steps = model.metadata["steps"]
    assert model.metadata["most_row_views"] == steps
    assert model.metadata["rehearsal_tokens"] == held * steps  # type: ignore[operator]
