"""Many processes that train one model give what one process gives, and a lost one costs nothing but time."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from cfsd.errors import CfsdError, Crashed, Stopped
from cfsd.machine import Machine
from cfsd.model.loading import load_model
from cfsd.process.child import run_in_process
from cfsd.store.artifact import Artifact, Store
from cfsd.store.journal import read_metrics
from cfsd.train.batches.loading import batches_of
from cfsd.train.loss.objective import Objective, losses
from cfsd.train.spec import TrainRequest, TrainSpec
from cfsd.train.stage import train
from tests.conftest import ROOT, write_rows
from tests.train.test_train import World, bit_equal, distance, signals_given_back, trained, weights, world_in
from tests.train.test_train_interrupted import interrupted, saved_step

pytestmark = pytest.mark.processes

SPEC = TrainSpec(learning_rate=1e-3, epochs=4, seed=0)
LONG = SPEC.model_copy(update={"epochs": 16})
ONE = Machine(device="cpu", threads=1, checkpoint_steps=5, micro_batch_tokens=64)  # several micro-batches per rank
TWO = ONE.model_copy(update={"training_processes": 2})
__all__ = ["signals_given_back"]

SHARDED = """
import torch
from types import SimpleNamespace
from torch import distributed
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from cfsd.store.artifact import Store
from cfsd.train.loss.objective import Objective, losses
from cfsd.process.child import serve_request
from cfsd.train.spec import TrainRequest
from cfsd.train.batches.loading import batches_of
from tests.train.test_distributed import base_in_float64

def sharded(model):
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP")
    named = {"mixed_precision": "no", "is_main_process": True, "device": torch.device("cpu")}
    return fsdp2_prepare_model(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), **named), model)

def work(folder, text):
    request = TrainRequest.model_validate_json(text)
    distributed.init_process_group("gloo")
    store, world, rank = Store(request.home), distributed.get_world_size(), distributed.get_rank()
    share, found = batches_of(store, request.mixture, request.spec, 64, None, rank, world)[0], []
    for tied in (False, True):
        model = base_in_float64(store, request.base, tied=tied)
        Objective(model, request.spec.rehearsal)
        model = sharded(model)
        whole = sum(p.numel() for p in model.parameters())
        assert 2 * sum(p.to_local().numel() for p in model.parameters()) == whole, "each rank holds half"
        total = torch.zeros((), dtype=torch.float64)
        for micro_batch in share.micro_batches:
            loss = losses(model, micro_batch, 0.7).loss
            (world * loss).backward()
            total += loss.detach()
        distributed.all_reduce(total)
        found.append(float(total))
        grads = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
        if rank == 0:
            torch.save(grads, folder / f"grads-{tied}.pt")
    return {"losses": found, "micro_batches": len(share.micro_batches)}

serve_request(work)
"""


AS_ON_GPUS = """
import os
from accelerate import state
from accelerate.utils import DistributedType
from cfsd.machine import Machine
from cfsd.process.child import serve_request
from cfsd.train.spec import TrainRequest
from cfsd.train.trainer import GlobalBatchTrainer, fit

# accelerate shards on accelerators alone: it is told that these processes have some
begin, step = state.AcceleratorState.__init__, GlobalBatchTrainer.training_step

def begun(self, *given, **named):
    shared = state.PartialState._shared_state
    if shared.get("distributed_type") == DistributedType.MULTI_CPU:
        shared["distributed_type"] = DistributedType.MULTI_GPU
    begin(self, *given, **named)

def cut(self, *given):
    assert self.state.global_step < int(os.environ["LAST"]), "cut here"
    assert self.is_fsdp_enabled
    return step(self, *given)

state.AcceleratorState.__init__, GlobalBatchTrainer.training_step = begun, cut
Machine.resolved_sharding = lambda self: "shard"
serve_request(lambda folder, text: fit(folder, TrainRequest.model_validate_json(text)))
"""


def base_in_float64(store: Store, base: Artifact, *, tied: bool) -> PreTrainedModel:
    """Return the base; `tied` gives it one matrix for both embeddings, as most small models have."""
    model: Any = load_model(store.path(base), "cpu", "float64")
    model.config.tie_word_embeddings = tied
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    loaded: PreTrainedModel = model
    return loaded


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> World:
    folder = tmp_path_factory.mktemp("world")
    return world_in(Store(folder / "data"), model_folder, write_rows(folder / "rows.jsonl", count=48))


def request_of(world: World, machine: Machine, spec: TrainSpec) -> TrainRequest:
    return TrainRequest(home=world.store.home, base=world.base, mixture=world.mixture, spec=spec, machine=machine)


def make(world: World, key: str, machine: Machine, spec: TrainSpec = SPEC) -> Artifact:
    environment = machine.environment("train")
    work = request_of(world, machine, spec)
    return world.store.make("model", key, lambda draft: train(work, draft), environment=environment)[0]


def losses_of(world: World, model: Artifact) -> list[tuple[int, float]]:
    records = read_metrics(world.store.path(model))
    return [(r["step"], r["value"]) for r in records if r["name"] == "train/loss"]


def test_two_processes_train_what_one_trains(world: World) -> None:
    one, two = trained(world, "one", world.mixture, SPEC, ONE), make(world, "two", TWO)
    found, wanted = losses_of(world, two), losses_of(world, one)
    assert [step for step, _ in found] == list(range(1, 5 * SPEC.epochs + 1))
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in wanted], abs=1e-5)
    assert distance(weights(world, two), weights(world, one)) < 1e-5
    assert distance(weights(world, two), weights(world, world.base)) > 1e-3
    assert {name: two.metadata[name] for name in ("steps", "tokens")} == {"steps": 20, "tokens": one.metadata["tokens"]}


def test_a_sharded_model_has_the_loss_and_gradients_of_a_whole_one(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As accelerate shards it, which gathers the head with the last norm: before, it was a shard and no product was."""
    (tmp_path / "sharded.py").write_text(SHARDED)
    (tmp_path / "draft").mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    text = request_of(world, TWO, SPEC).model_dump_json()
    metadata: Any = run_in_process("sharded", tmp_path / "draft", text, processes=2)
    share = batches_of(world.store, world.mixture, SPEC, 64)[0]
    assert 1 < metadata["micro_batches"] < len(share.micro_batches)
    for tied, found in zip((False, True), metadata["losses"], strict=True):
        grads: dict[str, Tensor] = torch.load(tmp_path / "draft" / f"grads-{tied}.pt", weights_only=True)
        model = base_in_float64(world.store, world.base, tied=tied)
        Objective(model, SPEC.rehearsal)
        total = 0.0
        for micro_batch in share.micro_batches:
            loss = losses(model, micro_batch, 0.7).loss
            loss.backward()
            total += float(loss.detach())
        assert found == pytest.approx(total, rel=1e-12)
        wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert grads.keys() == wanted.keys()
        for name, grad in wanted.items():
            assert torch.allclose(grads[name], grad, rtol=1e-9, atol=1e-12), (tied, name)


@pytest.mark.slow
def test_a_sharded_training_is_that_of_one_process_and_goes_on_where_it_was_cut(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By accelerate and the Trainer from the first step to the saved model, on CPUs in the place of GPUs."""
    (tmp_path / "as_on_gpus.py").write_text(AS_ON_GPUS)
    draft = tmp_path / "draft"
    draft.mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    text = request_of(world, TWO, SPEC).model_dump_json()
    monkeypatch.setenv("LAST", "7")
    with pytest.raises(Crashed, match="cut here"):
        run_in_process("as_on_gpus", draft, text, processes=2)
    monkeypatch.setenv("LAST", "1000")
    metadata = run_in_process("as_on_gpus", draft, text, processes=2)
    assert metadata["continued_from_step"] == 5 and metadata["steps"] == 20
    one = trained(world, "as one", world.mixture, SPEC, ONE)
    wanted, base = weights(world, one), weights(world, world.base)
    found = load_file(draft / "model.safetensors")
    assert distance(found, wanted) < 1e-5 and distance(found, base) > 1e-3
    losses = [(r["step"], r["value"]) for r in read_metrics(draft) if r["name"] == "train/loss"]
    assert [step for step, _ in losses] == list(range(1, 21))
    assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in losses_of(world, one)], abs=1e-5)
    assert (draft / "config.json").read_text() == (world.store.path(one) / "config.json").read_text()


def second_rank(launcher: psutil.Process) -> psutil.Process:
    ranks = [child for child in launcher.children() if child.environ().get("RANK") == "1"]
    assert len(ranks) == 1
    return ranks[0]


@pytest.mark.slow
def test_a_lost_rank_ends_the_others_and_the_draft_goes_on_to_the_same_bits(
    world: World,
) -> None:
    draft = world.store.root / "model" / "cut.draft"

    def cut_short(after_step: int, act: Callable[[psutil.Process], object]) -> CfsdError:
        return interrupted(
            partial(make, world, "cut", TWO, LONG), draft, act, lambda written, saved: written > saved > after_step
        )

    lost = cut_short(3, lambda launcher: second_rank(launcher).kill())
    assert isinstance(lost, Crashed) and str(lost).startswith("rank 1 of 2 ended with code -9")
    killed_at = saved_step(draft)
    gone = cut_short(killed_at + 3, psutil.Process.kill)
    assert isinstance(gone, Crashed)
    stopped = cut_short(saved_step(draft) + 3, lambda launcher: second_rank(launcher).terminate())
    assert isinstance(stopped, Stopped) and f"after step {saved_step(draft)}" in str(stopped)
    stopped_at = saved_step(draft)
    made = make(world, "cut", TWO, LONG)
    assert made.metadata["continued_from_step"] == stopped_at > killed_at
    whole = make(world, "whole", TWO, LONG)
    assert bit_equal(weights(world, made), weights(world, whole))
    assert losses_of(world, made) == losses_of(world, whole)
    assert [step for step, _ in losses_of(world, made)] == list(range(1, 5 * LONG.epochs + 1))
