"""TRL's SFTTrainer with rehearsal; skipped where TRL is not installed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cfsd.model.loading import load_tokenizer
from cfsd.store.artifact import Store
from cfsd.train.batches.loading import batches_of
from cfsd.train.batches.stored_distributions import StoredDistributions, lay_out
from cfsd.train.loss.objective import Objective, losses
from cfsd.train.spec import RehearsalSpec
from tests.conftest import ROOT, save_model, write_rows
from tests.integrations.test_rehearsal import InOrder, arguments, base_of, logged, state_of
from tests.test_docs import blocks
from tests.train.test_train import STEPS, Plain, World, distance, figures, spec_with, trained, weights, world_in
from tests.train.test_train import signals_given_back as signals_given_back

pytest.importorskip("trl")
from trl import SFTConfig

from cfsd.integrations.trl import DivergenceCallback, RehearsalSFTTrainer

TOKENS = 96


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> World:
    folder = tmp_path_factory.mktemp("world")
    return world_in(Store(folder / "data"), model_folder, write_rows(folder / "rows.jsonl", count=48), corpus_rows=30)


class Ordered(InOrder, RehearsalSFTTrainer):
    pass


def trainer_of(world: World, folder: Path, *, given: Any = (), **more: Any) -> Any:
    """A training on the same rows as `tests.train.test_train.SPEC`; TRL's own defaults are bf16 and checkpointing."""
    plain = arguments(folder, bf16=False, max_length=None) | dict(given)
    data = Plain(world)
    rows = Dataset.from_list([data[i] for i in range(len(data))])
    chosen = {"corpus": world.store.path(world.corpus), "rehearsal_tokens": TOKENS} | more
    tokenizer = load_tokenizer(world.store.path(world.base))
    return Ordered(base_of(world), SFTConfig(**plain), train_dataset=rows, processing_class=tokenizer, **chosen)


def test_it_is_the_training_of_a_recipe(world: World, tmp_path: Path) -> None:
    """Ten steps, with TRL's head in chunks and its gradient checkpointing."""
    trainer = trainer_of(world, tmp_path)
    assert trainer.args.gradient_checkpointing
    trainer.train()
    trainer.save_model()
    ours = trained(world, "recipe kl", world.mixture, spec_with(rehearsal={"loss": "kl"}))
    assert distance(load_file(tmp_path / "model.safetensors"), weights(world, ours)) < 1e-5
    for name in ("loss", "target_loss", "rehearsal_loss"):
        wanted = list(figures(world, ours, f"train/{name}").values())
        assert len(wanted) == STEPS and logged(trainer, name) == pytest.approx(wanted, abs=1e-5)
    assert len(logged(trainer, "mean_token_accuracy")) == STEPS  # TRL's own figures go on
    assert "cfsd" not in (tmp_path / "config.json").read_text()


def test_one_step_has_the_loss_and_the_gradient_of_ours(world: World, tmp_path: Path) -> None:
    """SGD with a rate of 1 and no clipping: the step is the gradient."""
    sgd = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "max_steps": 1, "warmup_steps": 0}
    trainer = trainer_of(world, tmp_path, given=sgd)
    before = state_of(trainer)
    trainer.train()
    moved = {name: before[name] - tensor for name, tensor in state_of(trainer).items()}
    wanted = gradient_of(world)
    assert max(float((moved[n] - grad).norm() / grad.norm()) for n, grad in wanted.items()) < 1e-4  # of differences
    assert sum(float(grad.norm()) for grad in wanted.values()) > 1


def gradient_of(world: World) -> dict[str, torch.Tensor]:
    """The first global batch's gradient, by our own objective on all of its rows at once."""
    corpus, spec = world.store.path(world.corpus), spec_with(rehearsal={"loss": "kl"})
    lay_out(corpus, world.store.home / "laws", top=True)
    laws = StoredDistributions(world.store.home / "laws", corpus)
    model = base_of(world)
    Objective(model, RehearsalSpec(loss="kl"))
    for micro_batch in batches_of(world.store, world.mixture, spec, 10**6, laws)[0].micro_batches:
        losses(model, micro_batch).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("given", [
    {"padding_free": True},
    {"packing": True, "max_length": 64},
    {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2},
])  # fmt: skip
def test_however_target_rows_are_laid_out_the_rehearsal_is_the_same(
    world: World, tmp_path: Path, given: dict[str, Any]
) -> None:
    trainer, plain = trainer_of(world, tmp_path, given=given), trainer_of(world, tmp_path)
    for each in (trainer, plain):
        each.args.max_steps = 1
        each.train()
    assert logged(trainer, "rehearsal_loss") == pytest.approx(logged(plain, "rehearsal_loss"), abs=1e-6)
    if "packing" not in given:  # which puts other rows into a batch
        assert distance(state_of(trainer), state_of(plain)) < 1e-5


def test_an_adapter_is_trained(world: World, tmp_path: Path) -> None:
    """From `peft_config`, in bfloat16 as TRL does by default; saved as TRL saves adapters."""
    lora = LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear")
    trainer = trainer_of(world, tmp_path, given={"learning_rate": 1e-2, "bf16": True}, peft_config=lora)
    trainer.add_callback(DivergenceCallback(trainer, every=5, probe=world.store.path(world.sample)))
    trainer.train()
    trainer.save_model()
    found = logged(trainer, "rehearsal_loss")
    assert found[0] < 5e-3 < max(found)
    assert logged(trainer, "probe_kl")[-1] > 5e-3
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_the_example_of_the_page_trains(
    world: World,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (block,) = [text for text in blocks(ROOT / "docs" / "how-to" / "own-trainer.md", "python") if "Rehearsal" in text]
    assert len(block.splitlines()) <= 20
    folders = {"key": world.corpus, "key of a sample": world.sample, "key of a chat sample": world.sample}
    for name, artifact in folders.items():
        block = block.replace(f"data/store/corpus/<{name}>", str(world.store.path(artifact)))
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "my-base")
    lines = [json.loads(line) for line in write_rows(tmp_path / "mine.jsonl").read_text().splitlines()]
    renamed = ({"prompt": line["prompt"], "completion": line["response"]} for line in lines)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in renamed))
    names: dict[str, Any] = {}
    exec(block.replace("SFTConfig(", "SFTConfig(use_cpu=True, "), names)
    logged_by = {name for entry in names["trainer"].state.log_history for name in entry}
    assert {"loss", "target_loss", "rehearsal_loss", "probe_kl", "chat_kl"} <= logged_by
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "tuned").config.vocab_size == world.base.metadata["vocabulary"]
    )
