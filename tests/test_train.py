"""Training: plain fine-tuning is transformers' own, rehearsal adds to it, and an interruption changes no bit."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainingArguments

from cfsd.artifact import Artifact, Draft, Store, key_of
from cfsd.checkpoint import load_model, load_tokenizer, read_start_token
from cfsd.errors import NotFinite
from cfsd.evaluate import score_probe
from cfsd.filter import FilterSpec, filter_rows
from cfsd.generate import GenerateSpec, ProbeSpec, generate, probe
from cfsd.journal import read_metrics
from cfsd.machine import Machine
from cfsd.mix import MixSpec, mix
from cfsd.target import Target, prepare
from cfsd.train import TrainRequest, TrainSpec
from cfsd.trainer import batches_of, fit, last_whole_checkpoint
from tests.conftest import fetched, save_model, write_rows

MACHINE = Machine(device="cpu", threads=1, checkpoint_steps=1000)
EPOCHS = 2
SPEC = TrainSpec(learning_rate=1e-3, epochs=EPOCHS, seed=0)
BATCH = 8


class World(NamedTuple):
    store: Store
    base: Artifact
    mixture: Artifact  # target and rehearsal
    plain: Artifact  # the same target without rehearsal


def world_in(store: Store, model: Path, rows: Path) -> World:
    """Go the way of a recipe up to the mixture."""
    base = fetched(store, model)
    target = Target(path=str(rows), held_out=8, seed=0)
    prepared = store.make("target", key_of("prepare", base, target), lambda draft: prepare(base, target, draft))[0]

    def mixed(count: int) -> Artifact:
        law, look, spec = GenerateSpec(rows=count, length=16, seed=0), FilterSpec(), MixSpec(target_rows=BATCH, seed=0)
        corpus = store.make("corpus", f"{count:016}", lambda draft: generate(base, None, law, draft, MACHINE))[0]
        kept = store.make("corpus", key_of("f", corpus), lambda d: filter_rows(store.path(corpus), look, d))[0]
        folders = store.path(prepared), store.path(kept)
        return store.make("mixture", key_of("mix", kept), lambda draft: mix(*folders, spec, draft))[0]

    return World(store, base, mixed(60), mixed(0))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> World:
    folder = tmp_path_factory.mktemp("world")
    return world_in(Store(folder / "data"), model_folder, write_rows(folder / "rows.jsonl", count=48))


@pytest.fixture(autouse=True, scope="module")
def signals_given_back() -> Iterator[None]:
    """A training in this process takes over the signals; give them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def trained(world: World, key: str, mixture: Artifact, spec: TrainSpec = SPEC, machine: Machine = MACHINE) -> Artifact:
    request = TrainRequest(home=world.store.home, base=world.base, mixture=mixture, spec=spec, machine=machine)

    def work(draft: Draft) -> None:
        draft.facts |= fit(draft.folder, request)

    return world.store.make("model", key, work)[0]


def weights(world: World, model: Artifact) -> dict[str, Tensor]:
    return load_file(world.store.path(model) / "model.safetensors")


def bit_equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def distance(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """Return the norm of the difference relative to that of `two`."""
    parts = [torch.cat([weights[name].double().flatten() for name in sorted(two)]) for weights in (one, two)]
    return float((parts[0] - parts[1]).norm() / parts[1].norm())


def test_training_lowers_the_loss_and_writes_every_step(world: World) -> None:
    model = trained(world, "learns", world.mixture)
    records = list(read_metrics(world.store.path(model)))
    for name in ("train/target_loss", "train/rehearsal_loss", "train/gradient_norm"):
        assert [r["step"] for r in records if r["name"] == name] == list(range(1, 5 * EPOCHS + 1))
    losses = [r["value"] for r in records if r["name"] == "train/target_loss"]
    assert losses[-1] < losses[0] - 0.1
    assert model.facts["steps"] == 5 * EPOCHS
    assert not (world.store.path(model) / "checkpoints").exists()


def test_the_result_is_a_whole_transformers_folder(world: World) -> None:
    folder = world.store.path(trained(world, "learns", world.mixture))
    base = world.store.path(world.base)
    assert load_model(folder, "cpu").config.vocab_size == world.base.facts["vocabulary"]
    assert load_tokenizer(folder).get_vocab() == load_tokenizer(base).get_vocab()
    assert read_start_token(folder) == world.base.facts["start_token"]


def test_weight_zero_and_no_rehearsal_rows_are_one_training(world: World) -> None:
    idle = trained(world, "idle", world.mixture, SPEC.model_copy(update={"rehearsal_weight": 0.0}))
    plain = trained(world, "plain", world.plain)
    rehearsed = trained(world, "learns", world.mixture)
    assert bit_equal(weights(world, idle), weights(world, plain))
    assert not bit_equal(weights(world, rehearsed), weights(world, plain))


class Plain(Dataset[dict[str, Any]]):
    """Target rows as stock fine-tuning takes them, in the order of our global batches."""

    def __init__(self, world: World) -> None:
        data = batches_of(world.store, world.plain, SPEC, 10**6)
        self.rows = [data.rows[i] for batch in data.plan for i in batch.target]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        marked = zip(row.token_ids, row.supervised, strict=True)
        return {"input_ids": row.token_ids, "labels": [token if counted else -100 for token, counted in marked]}


def collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    longest = max(len(item["input_ids"]) for item in items)

    def padded(name: str, value: int) -> Tensor:
        return torch.tensor([item[name] + [value] * (longest - len(item[name])) for item in items])

    mask = torch.tensor([[1] * len(i["input_ids"]) + [0] * (longest - len(i["input_ids"])) for i in items])
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": mask}


class Stock(Trainer):
    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def test_without_rehearsal_it_is_the_stock_trainer(world: World, tmp_path: Path) -> None:
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=BATCH, num_train_epochs=1, learning_rate=1e-3,
        lr_scheduler_type="cosine", warmup_steps=round(0.03 * 5 * EPOCHS), max_grad_norm=1.0, use_cpu=True, seed=0,
        report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    model = load_model(world.store.path(world.base), "cpu", "float32")
    stock = Stock(model=model, args=arguments, train_dataset=Plain(world), data_collator=collate)
    stock.train()
    model.save_pretrained(tmp_path)
    ours = trained(world, "plain", world.plain)
    found, wanted = weights(world, ours), load_file(tmp_path / "model.safetensors")
    start = load_file(world.store.path(world.base) / "model.safetensors")
    assert distance(found, wanted) < 1e-5
    assert distance(found, start) > 1e-3
    records = [r["value"] for r in read_metrics(world.store.path(ours)) if r["name"] == "train/loss"]
    assert records == pytest.approx([log["loss"] for log in stock.state.log_history if "loss" in log], abs=1e-4)


def test_weights_do_not_depend_on_micro_batches_beyond_rounding(world: World) -> None:
    one = trained(world, "tiny packs", world.mixture, machine=MACHINE.model_copy(update={"micro_batch_tokens": 1}))
    whole = trained(world, "learns", world.mixture)
    assert distance(weights(world, one), weights(world, whole)) < 1e-5


def test_learning_rate_zero_leaves_the_base_and_diverges_by_nothing(world: World) -> None:
    spec = SPEC.model_copy(update={"learning_rate": 0.0, "weight_decay": 0.1})
    still = trained(world, "still", world.mixture, spec)
    assert bit_equal(weights(world, still), weights(world, world.base))
    look = ProbeSpec(rows=30, length=12, seed=0)
    held = world.store.make("corpus", "probe", lambda draft: probe(world.base, look, draft, MACHINE))[0]

    def score(draft: Draft) -> None:
        score_probe(world.base, still, held, draft, MACHINE)

    facts = world.store.make("scores", "still", score)[0].facts
    assert (facts["probe_kl"], facts["probe_kl_sampled"]) == (0.0, 0.0)


def test_a_loss_that_is_not_finite_ends_the_training_with_a_remedy(world: World) -> None:
    with pytest.raises(NotFinite, match=r"at step \d+; lower train\.learning_rate"):
        trained(world, "explodes", world.plain, SPEC.model_copy(update={"learning_rate": 1e30}))
    assert world.store.find("model", "explodes") is None


def test_weights_that_are_not_finite_are_never_saved(world: World) -> None:
    """One step: its loss is finite, what it makes of the weights is not."""
    spec = SPEC.model_copy(update={"learning_rate": 1e39, "epochs": 1})
    with pytest.raises(NotFinite):
        assert all(
            t.isfinite().all() for t in weights(world, trained(world, "one step", one_step(world), spec)).values()
        )


def one_step(world: World) -> Artifact:
    """Return the plain mixture in one global batch."""
    facts = world.plain.facts | {"batch_target_rows": 1000}
    return world.plain.model_copy(update={"facts": facts})


def test_bfloat16_bases_give_bfloat16_models(world: World, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "half")
    load_model(folder, "cpu", "bfloat16").save_pretrained(folder)
    half = world._replace(base=fetched(world.store, folder))
    assert {tensor.dtype for tensor in weights(half, trained(half, "half", world.plain)).values()} == {torch.bfloat16}


def test_half_written_checkpoints_are_dropped(tmp_path: Path) -> None:
    for step, state in ((5, "{}"), (10, "{}"), (15, '{"global'), (20, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    found = last_whole_checkpoint(tmp_path)
    assert found and found.name == "checkpoint-10"
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-5", "checkpoint-10"}


def test_a_full_disk_at_the_end_is_continued_from_the_last_checkpoint(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    often = MACHINE.model_copy(update={"checkpoint_steps": 5})
    go: Callable[[], Artifact] = lambda: trained(world, "full disk", world.mixture, machine=often)  # noqa: E731
    with monkeypatch.context() as disk:
        disk.setattr("cfsd.trainer.save_model", full)
        with pytest.raises(OSError, match="No space"):
            go()
    again = go()
    assert again.facts["continued_from_step"] == 5 * EPOCHS
    assert again.content == trained(world, "learns", world.mixture).content
