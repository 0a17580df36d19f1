"""QLoRA and the optimizers of bitsandbytes, on its CPU build; on CUDA the same calls, which were not run."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.training_args import OptimizerNames

from cfsd.errors import BadInput
from cfsd.machine import Machine
from cfsd.model.loading import load_model, load_quantised
from cfsd.overrides import override, read_yaml, validated
from cfsd.recipe import Recipe
from cfsd.store.artifact import Store
from cfsd.train.adapters import adapt, merge_trained
from cfsd.train.memory import Load, Shapes, load_of, training_memory
from cfsd.train.methods import Methods
from cfsd.train.spec import OF_TORCH_AND_TRANSFORMERS, RehearsalSpec, TrainSpec
from tests.conftest import ROOT, save_model, write_rows
from tests.train.test_methods import IDS, logits, moved
from tests.train.test_train import World, figures, signals_given_back, spec_with, trained, weights, world_in

__all__ = ["signals_given_back"]

OPTIMIZERS = list(TrainSpec.model_fields["optimizer"].annotation.__args__)  # type: ignore[union-attr]
QLORA = Methods.model_validate({"lora": {"rank": 4, "quantise": "nf4"}})
installed = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    model = save_model(folder / "model")
    return world_in(Store(folder / "data"), model, write_rows(folder / "rows.jsonl", count=24))


def test_optimizers_have_the_names_of_transformers() -> None:
    known = {name.value for name in OptimizerNames}
    assert set(OPTIMIZERS) - {"adamw"} <= known and set(OF_TORCH_AND_TRANSFORMERS) <= set(OPTIMIZERS)
    assert TrainSpec(optimizer="adamw").digest() == TrainSpec().digest() != TrainSpec(optimizer="sgd").digest()


@pytest.mark.parametrize("train", [{"optimizer": "paged_adamw_8bit"}, {"methods": QLORA.model_dump()}])
def test_without_the_library_it_is_refused_before_anything_runs(
    train: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = read_yaml(ROOT / "deployments" / "recipes" / "tiny.yaml")
    recipe = validated(Recipe, override(content, {f"train.{name}": value for name, value in train.items()}), "mine")
    monkeypatch.setattr("cfsd.train.spec.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"train\.(optimizer|methods).*is not installed.*cfsd\[qlora\]"):
        recipe.check()
    validated(Recipe, override(content, {"train.optimizer": "adafactor"}), "mine").check()


def test_the_plan_counts_what_is_saved() -> None:
    shapes, machine = Shapes(512, 3, 1408, heads=8, kv_heads=8, vocabulary=8192), Machine(device="cpu")
    layers = shapes.layers * sum(a * b for a, b in shapes.matrices())
    spec = TrainSpec.model_validate({"methods": {"lora": {"rank": 4, "quantise": "nf4"}}})
    whole, quantised = (
        training_memory(shapes, load_of(one, machine)).weights
        for one in (TrainSpec.model_validate({"methods": {"lora": {"rank": 4}}}), spec)
    )
    assert (whole - quantised) / layers == pytest.approx(3.48)
    live = spec.model_copy(update={"rehearsal": RehearsalSpec(loss="kl", reference="base")})
    assert training_memory(shapes, load_of(live, machine)).live_base == 0  # the trained model is its own reference
    held = [training_memory(shapes, Load(optimizer=name)).moments for name in OPTIMIZERS]
    assert [count / shapes.parameters() for count in held] == [8, 2, 8, 2, 4, 1, 4, 1, 12, 3, 12, 3, 0, 0]


@pytest.mark.processes
@pytest.mark.parametrize("optimizer", ["adafactor", "sgd"])
def test_other_optimizers_train(optimizer: str, world: World) -> None:
    rate = {"adafactor": 1e-3, "sgd": 1.0}[optimizer]
    model = trained(world, optimizer, world.plain, spec_with(optimizer=optimizer, learning_rate=rate))
    losses = list(figures(world, model, "train/target_loss").values())
    assert losses[-1] < losses[0] - 0.02


@installed
def test_a_quantised_base_is_trained_beside_and_merged_into_the_base_as_it_was(world: World, tmp_path: Path) -> None:
    from bitsandbytes import functional

    folder = world.store.path(world.base)
    plain = load_model(folder, "cpu")
    quantised = load_quantised(folder, "cpu", "nf4", torch.float32)
    place = "model.layers.0.mlp.up_proj"
    layer, whole = quantised.get_submodule(place), plain.get_parameter(f"{place}.weight")
    held: Any = layer.weight
    assert held.dtype == torch.uint8 and held.numel() == whole.numel() / 2
    away = functional.dequantize_4bit(held.data, held.quant_state) - whole
    assert 0.02 < away.norm() / whole.norm() < 0.25  # 0.1 of a normal distribution, and its few scales in 8 bits
    adapted: Any = moved(adapt(QLORA, quantised))
    assert {p.shape for p in adapted.parameters() if p.requires_grad} and adapted.model.is_quantized
    merged = merge_trained(QLORA, adapted, tmp_path, folder)
    start = dict(plain.named_parameters())
    for name, weight in merged.named_parameters():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        parts = {n: p for n, p in adapted.named_parameters() if n.startswith(key)}
        change = (weight - start[name]).detach()
        if parts:
            added = parts[f"{key}B.default.weight"] @ parts[f"{key}A.default.weight"]
            assert torch.allclose(change, added.detach(), atol=1e-6)
        else:
            assert not change.any()
    assert (logits(merged, IDS) - logits(plain)).abs().max() > 1e-2


@installed
@pytest.mark.processes
@pytest.mark.slow
def test_a_whole_training_with_a_quantised_base_and_an_optimizer_in_8_bits(world: World) -> None:
    """The live base is quantised as well: both are one function at the start."""
    rehearsed = {"loss": "kl", "reference": "base"}
    methods = {"lora": {"rank": 4, "quantise": "nf4"}}
    spec = spec_with(methods=methods, rehearsal=rehearsed, optimizer="adamw_bnb_8bit", learning_rate=1e-2)
    model = trained(world, "qlora", world.mixture, spec)
    assert figures(world, model, "train/divergence")[1] == 0
    losses = list(figures(world, model, "train/target_loss").values())
    assert losses[-1] < losses[0] - 0.02
    found, start = weights(world, model), weights(world, world.base)
    changed = {name for name in start if not torch.equal(found[name], start[name])}
    assert found.keys() == start.keys() and changed and all("_proj" in name for name in changed)
    assert all(int(torch.linalg.matrix_rank((found[n] - start[n]).double(), atol=1e-4)) <= 4 for n in changed)
    assert "the base was held in nf4" in str(model.metadata["said"])
