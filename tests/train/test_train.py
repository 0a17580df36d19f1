"""Training: plain fine-tuning is transformers' own, rehearsal adds to it, and each setting does what it says."""

import json
import math
import shutil
import signal
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainingArguments

from cfsd.data.stage import prepare
from cfsd.data.target import Target
from cfsd.errors import BadInput, NotFinite, StoreError
from cfsd.evaluate.divergence import divergence, score_probe
from cfsd.filter.spec import FilterSpec
from cfsd.filter.stage import filter_rows
from cfsd.generate.spec import GenerateSpec, ProbeSpec
from cfsd.generate.stage import generate, probe
from cfsd.machine import Machine
from cfsd.mix.spec import MixSpec
from cfsd.mix.stage import mix
from cfsd.mix.weigh import weigh
from cfsd.model.loading import load_model, load_tokenizer, read_start_token
from cfsd.store.artifact import Artifact, Draft, Store, key_of
from cfsd.store.journal import read_metrics
from cfsd.store.tables import BATCHES, read_rows
from cfsd.train.batches.loading import batches_of
from cfsd.train.methods.ewc import FisherSpec
from cfsd.train.methods.fisher import fisher
from cfsd.train.methods.method import AlongSpec
from cfsd.train.spec import TrainRequest, TrainSpec, Watched
from cfsd.train.target_distributions import store_target
from cfsd.train.trainer import fit, last_whole_checkpoint
from tests.conftest import fetched, save_model, write_rows

pytestmark = pytest.mark.processes

MACHINE = Machine(device="cpu", threads=1, checkpoint_steps=1000)
EPOCHS = 2
SPEC = TrainSpec(learning_rate=1e-3, epochs=EPOCHS, seed=0)
BATCH = 8


STEPS = 5 * EPOCHS


class World(NamedTuple):
    store: Store
    base: Artifact
    mixture: Artifact  # target and rehearsal
    plain: Artifact  # the same target without rehearsal
    target: Artifact
    corpus: Artifact  # of `mixture`, with the eight likeliest tokens of each position
    sample: Artifact  # another sample of the base


def world_in(store: Store, model: Path, rows: Path, corpus_rows: int = 100, rehearsal_tokens: int = 96) -> World:
    """Go the way of a recipe up to the mixture; by default there is a corpus row for every step of two epochs."""
    base = fetched(store, model)
    target = Target(path=str(rows), held_out=8, seed=0)
    prepared = store.make("target", key_of("prepare", base, target), lambda draft: prepare(base, target, draft))[0]
    mixing = MixSpec(target_rows=BATCH, rehearsal_tokens=rehearsal_tokens, seed=0)

    def corpus_of(count: int) -> Artifact:
        law, look = GenerateSpec(rows=count, length=16, seed=0, top_logprobs=8), FilterSpec()
        made = store.make("corpus", f"{count:016}", lambda draft: generate(base, None, law, draft, MACHINE))[0]
        return store.make("corpus", key_of("f", made), lambda d: filter_rows(store.path(made), look, d))[0]

    def mixed(kept: Artifact) -> Artifact:
        folders = store.path(prepared), store.path(kept)
        return store.make("mixture", key_of("mix", kept), lambda draft: mix(*folders, mixing, draft))[0]

    corpus, look = corpus_of(corpus_rows), ProbeSpec(rows=24, length=12, seed=5)
    sample = store.make("corpus", "sample", lambda draft: probe(base, look, draft, MACHINE))[0]
    return World(store, base, mixed(corpus), mixed(corpus_of(0)), prepared, corpus, sample)


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


def request_of(world: World, mixture: Artifact, spec: TrainSpec, machine: Machine = MACHINE) -> TrainRequest:
    """What the stage would ask for: inputs that the spec makes no use of are None."""
    return TrainRequest(
        home=world.store.home,
        base=world.base,
        mixture=mixture,
        corpus=world.corpus if spec.rehearsal.reads_corpus() else None,
        fisher=fisher_in(world, spec.methods.ewc.rows) if spec.methods.ewc.is_on() else None,
        losses=losses_in(world) if spec.methods.learned() else None,
        along=along_in(world, held.stored) if (held := spec.methods.divergence()) and held.stored else None,
        watched=Watched(sample=world.sample, target=world.target) if spec.watch.every else None,
        spec=spec,
        machine=machine,
    )


def fisher_in(world: World, rows: int) -> Artifact:
    spec = FisherSpec(rows=rows)
    work: Callable[[Draft], None] = lambda draft: fisher(world.base, world.corpus, spec, draft, MACHINE)  # noqa: E731
    return world.store.make("fisher", f"{rows:016}", work)[0]


def losses_in(world: World) -> Artifact:
    """Return the base's losses on the target."""
    return world.store.make("losses", "0" * 16, lambda draft: weigh(world.base, world.target, draft, MACHINE))[0]


def along_in(world: World, spec: AlongSpec) -> Artifact:
    """Return the base's distributions along the target."""
    work: Callable[[Draft], None] = lambda draft: store_target(world.base, world.target, spec, draft, MACHINE)  # noqa: E731
    return world.store.make("along", key_of("along", spec), work)[0]


def trained(world: World, key: str, mixture: Artifact, spec: TrainSpec = SPEC, machine: Machine = MACHINE) -> Artifact:
    request = request_of(world, mixture, spec, machine)

    def work(draft: Draft) -> None:
        draft.metadata |= fit(draft.folder, request)

    return world.store.make("model", key, work)[0]


def spec_with(**given: Any) -> TrainSpec:
    return TrainSpec.model_validate(SPEC.model_dump(exclude={"rehearsal", "methods", "watch"}) | given)


def figures(world: World, model: Artifact, name: str) -> dict[int, float]:
    """Return a metric by step."""
    return {r["step"]: r["value"] for r in read_metrics(world.store.path(model)) if r["name"] == name}


def diverged(world: World, model: Artifact) -> float:
    """Return KL(base || model) in nats per token of the sample, over the whole vocabulary."""
    at_base, at_model = (load_model(world.store.path(m), "cpu", "float32").eval() for m in (world.base, model))
    rows = [row["token_ids"] for row in read_rows(world.store.path(world.sample), "corpus", ["token_ids"])]
    found = divergence(at_base, at_model, rows)
    return sum(part.kl for part in found) / sum(part.num_tokens for part in found)


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
    assert model.metadata["steps"] == 5 * EPOCHS
    assert not (world.store.path(model) / "checkpoints").exists()


def test_the_result_is_a_whole_transformers_folder(world: World) -> None:
    folder = world.store.path(trained(world, "learns", world.mixture))
    base = world.store.path(world.base)
    assert load_model(folder, "cpu").config.vocab_size == world.base.metadata["vocabulary"]
    assert load_tokenizer(folder).get_vocab() == load_tokenizer(base).get_vocab()
    assert read_start_token(folder) == world.base.metadata["start_token"]


def test_weight_zero_and_no_rehearsal_rows_are_one_training(world: World) -> None:
    idle = trained(world, "idle", world.mixture, spec_with(rehearsal={"weight": 0.0}))
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

    metadata = world.store.make("scores", "still", score)[0].metadata
    assert (metadata["probe_kl"], metadata["probe_kl_sampled"]) == (0.0, 0.0)


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

    def work(draft: Draft) -> None:
        folder, left_out = world.store.path(world.plain), shutil.ignore_patterns("manifest.json")
        shutil.copytree(folder, draft.folder, dirs_exist_ok=True, ignore=left_out)
        asked = json.loads((folder / BATCHES).read_text()) | {"batch_target_rows": 1000}
        (draft.folder / BATCHES).write_text(json.dumps(asked))
        draft.metadata |= world.plain.metadata

    return world.store.make("mixture", "one batch", work)[0]


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
        disk.setattr("cfsd.train.trainer.save_model", full)
        with pytest.raises(OSError, match="No space"):
            go()
    again = go()
    assert again.metadata["continued_from_step"] == 5 * EPOCHS
    assert again.content == trained(world, "learns", world.mixture).content


# Rehearsal


def held(world: World, form: str, **given: Any) -> Artifact:
    """Return the model of a fast training with much rehearsal, in one form of its loss."""
    forms = {"none": {"weight": 0.0}, "nll": {}, "sampled": {"loss": "kl"}, "bucket": {"loss": "kl", "tail": "bucket"}}
    chosen = {"weight": 100.0} | forms.get(form, {"loss": "kl", "reference": "base"})
    spec = spec_with(learning_rate=3e-3, rehearsal=chosen, **given)
    return trained(world, f"held {form} {len(given)}", world.mixture, spec)


@pytest.mark.parametrize("form", ["sampled", "bucket", "base"])
def test_every_form_of_the_divergence_holds_the_model_near_the_base(world: World, form: str) -> None:
    model = held(world, form)
    assert 0 < diverged(world, model) < 0.65 * diverged(world, held(world, "none"))
    steps = figures(world, model, "train/divergence")
    assert list(steps) == list(range(1, STEPS + 1))
    assert abs(steps[1]) < 1e-4 < abs(steps[STEPS])  # the first is before any update


def test_the_bucket_trains_nearly_as_the_live_base_does(world: World) -> None:
    """It lacks the inside of a tail of eight of 33 tokens; the likelihood is another loss."""
    wanted = weights(world, held(world, "base"))
    near, far = (distance(weights(world, held(world, form)), wanted) for form in ("bucket", "nll"))
    assert near < far / 2


def test_lambda_moves_on_its_schedule_and_row_views_are_counted(world: World) -> None:
    spec = spec_with(epochs=4, rehearsal={"weight": 8.0, "final_weight": 0.5})
    model = trained(world, "schedule", world.mixture, spec)
    path = list(figures(world, model, "train/rehearsal_weight").values())
    assert (path[0], path[-1]) == pytest.approx((8.0, 0.5))
    moves = [math.log(after / before) for before, after in pairwise(path)]
    assert moves == pytest.approx([math.log(0.5 / 8) / 19] * 19)
    views = list(figures(world, model, "train/rehearsal_row_views").values())
    assert views[0] == 0 < views[-1] and views == sorted(views)
    assert model.metadata["most_row_views"] == math.ceil(views[-1]) + 1


def test_a_loss_says_what_it_is_made_of(world: World) -> None:
    model = trained(world, "learns", world.mixture)
    for step, loss in figures(world, model, "train/loss").items():
        parts = [figures(world, model, f"train/{part}_loss")[step] for part in ("target", "rehearsal")]
        assert loss == pytest.approx(sum(parts), rel=1e-5)
    assert not figures(world, model, "train/divergence")
    assert model.metadata["peak_memory"] > 1e7  # type: ignore[operator]


def test_a_budget_steers_lambda_by_what_fresh_rows_show(world: World) -> None:
    """A generous budget lets lambda fall, a tight one makes it rise; the state is in the facts and the journal."""
    found = {}
    for budget in (1e-4, 10.0):
        spec = spec_with(rehearsal={"budget": budget, "loss": "kl", "tail": "bucket"})
        model = trained(world, f"budget {budget}", world.mixture, spec)
        path = figures(world, model, "train/rehearsal_weight")
        estimates = figures(world, model, "train/divergence_estimate")
        assert path[1] == pytest.approx(1.0) and list(path) == list(range(1, STEPS + 1))
        assert model.metadata["budget"] == budget
        assert model.metadata["divergence_estimate"] == pytest.approx(estimates[STEPS])
        found[budget] = path[STEPS], model.metadata["final_weight"]
    assert found[10.0][0] < 0.1 < 1.5 < found[1e-4][0]
    assert found[10.0][1] <= found[10.0][0] and found[1e-4][1] >= found[1e-4][0]  # type: ignore[operator]


def test_with_the_likelihood_a_budget_reads_the_drawn_tokens(world: World) -> None:
    model = trained(world, "budget nll", world.mixture, spec_with(rehearsal={"budget": 0.05}))
    assert abs(figures(world, model, "train/divergence")[1]) < 1e-4  # what the sampler recorded is the base's own
    assert set(figures(world, model, "train/rehearsal_loss")) == set(range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("rehearsal", "words"),
    [
        ({"refresh": "fresh"}, r"no row may come twice; raise generate\.rows or lower mix\.rehearsal_tokens"),
        ({"budget": 0.1}, r"steps have none; raise generate\.rows about [\d.]+-fold"),
    ],
)
def test_a_corpus_that_is_too_small_is_refused_with_the_remedy(
    world: World, rehearsal: dict[str, Any], words: str
) -> None:
    with pytest.raises(BadInput, match=words):
        trained(world, f"too small {rehearsal}"[:20], world.mixture, spec_with(epochs=9, rehearsal=rehearsal))


def test_a_corpus_that_is_not_the_mixtures_is_refused(world: World) -> None:
    law, other = GenerateSpec(rows=100, length=16, seed=1, top_logprobs=8), "stranger"
    made = world.store.make("corpus", other, lambda draft: generate(world.base, None, law, draft, MACHINE))[0]
    stranger = world._replace(corpus=made)
    with pytest.raises(StoreError, match="is not the mixture's"):
        trained(stranger, "stranger", world.mixture, spec_with(rehearsal={"loss": "kl"}))


# Precision and memory


@pytest.mark.parametrize("rehearsal", [{}, {"loss": "kl"}, {"loss": "kl", "reference": "base"}])
def test_bfloat16_trains_near_float32(world: World, rehearsal: dict[str, Any]) -> None:
    half, whole = (
        trained(
            world, f"{precision} {len(rehearsal)}", world.mixture, spec_with(precision=precision, rehearsal=rehearsal)
        )
        for precision in ("bfloat16", "float32")
    )
    start, end = weights(world, world.base), weights(world, whole)
    assert {tensor.dtype for tensor in weights(world, half).values()} == {torch.float32}
    assert 0 < distance(weights(world, half), end) < distance(start, end) / 2
    losses = [list(figures(world, model, "train/target_loss").values()) for model in (half, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    if rehearsal:  # at the base: exactly nothing from the live one, rounding from what was stored
        at_base = abs(figures(world, half, "train/divergence")[1])
        assert at_base == 0 if "reference" in rehearsal else at_base < 3e-3


def test_checkpointing_of_activations_gives_the_same_weights(world: World) -> None:
    lean = MACHINE.model_copy(update={"gradient_checkpointing": True})
    one, two = trained(world, "lean", world.mixture, machine=lean), trained(world, "learns", world.mixture)
    assert distance(weights(world, one), weights(world, two)) < 1e-6


# Watching


def test_watching_changes_no_weight_and_measures_from_step_0_to_the_last(world: World) -> None:
    spec = spec_with(watch={"every": 4, "rows": 24})
    model, plain = trained(world, "watched", world.mixture, spec), trained(world, "learns", world.mixture)
    assert bit_equal(weights(world, model), weights(world, plain))
    kl, target = (figures(world, model, f"watch/{name}") for name in ("probe_kl", "target_loss"))
    assert list(kl) == list(target) == [0, 4, 8, STEPS]
    assert abs(kl[0]) < 1e-4 < kl[4] < kl[STEPS]
    assert kl[STEPS] == pytest.approx(diverged(world, model), rel=1e-3)
    assert target[STEPS] < target[0] - 0.1
    assert figures(world, model, "train/loss") == figures(world, plain, "train/loss")


def test_a_training_that_moves_too_far_ends_with_a_whole_model(world: World) -> None:
    spec = spec_with(watch={"every": 3, "stop_above": 1e-4})
    model = trained(world, "too far", world.mixture, spec)
    assert model.metadata["stopped_at_step"] == 3
    assert list(figures(world, model, "train/loss")) == [1, 2, 3]
    assert list(figures(world, model, "watch/probe_kl")) == [0, 3]
    assert 1e-4 < diverged(world, model) < diverged(world, trained(world, "learns", world.mixture))
    assert "stopped_at_step" not in trained(world, "learns", world.mixture).metadata


# Methods


@pytest.mark.parametrize("methods", [{"l2": {"weight": 10.0}}, {"ewc": {"weight": 100.0, "rows": 60}}])
def test_a_penalty_keeps_the_model_nearer_to_the_base(world: World, methods: dict[str, Any]) -> None:
    (name,) = methods
    pulled, free = trained(world, name, world.plain, spec_with(methods=methods)), trained(world, "plain", world.plain)
    start = weights(world, world.base)
    if name == "l2":
        assert distance(weights(world, pulled), start) < 0.9 * distance(weights(world, free), start)
    assert diverged(world, pulled) < 0.9 * diverged(world, free)
    penalty = figures(world, pulled, f"train/penalty/{name}")
    assert penalty[1] == 0 < penalty[2]
    added = figures(world, pulled, "train/loss")[STEPS] - figures(world, pulled, "train/target_loss")[STEPS]
    assert added > 0


def test_lora_leaves_a_plain_model_and_its_adapter(world: World) -> None:
    spec = spec_with(learning_rate=1e-2, methods={"lora": {"rank": 4}})
    model = trained(world, "lora", world.mixture, spec)
    folder, found, start = world.store.path(model), weights(world, model), weights(world, world.base)
    assert found.keys() == start.keys() and load_model(folder, "cpu").config.vocab_size
    changed = {name for name in start if not torch.equal(found[name], start[name])}
    assert changed and all("_proj" in name for name in changed)
    assert all(int(torch.linalg.matrix_rank((found[n] - start[n]).double(), atol=1e-4)) <= 4 for n in changed)
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["r"] == 4
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    losses = figures(world, model, "train/target_loss")
    assert losses[STEPS] < losses[1] - 0.05


@pytest.mark.parametrize("methods", [{"lora": {"rank": 4}}, {"osft": {"preserved": 0.5}}])
def test_an_adapter_with_learning_rate_zero_is_the_base(methods: dict[str, Any], world: World) -> None:
    spec = spec_with(learning_rate=0.0, methods=methods)
    model = trained(world, f"still {next(iter(methods))}", world.mixture, spec)
    assert bit_equal(weights(world, model), weights(world, world.base))


def test_osft_leaves_the_largest_directions_of_every_layer_alone(world: World) -> None:
    model = trained(world, "osft", world.mixture, spec_with(learning_rate=1e-2, methods={"osft": {"preserved": 0.5}}))
    found, start = weights(world, model), weights(world, world.base)
    changed = {name for name in start if not torch.equal(found[name], start[name])}
    assert changed and all("_proj" in name for name in changed)
    for name in changed:
        change = (found[name] - start[name]).double()
        left, _, right = torch.linalg.svd(start[name].double(), full_matrices=False)
        kept = min(change.shape) // 2
        assert (left[:, :kept].T @ change).norm() < 1e-4 * change.norm() > (change @ right[:kept].T).norm()
    assert json.loads((world.store.path(model) / "adapter" / "adapter_config.json").read_text())["peft_type"] == "OSF"
    losses = figures(world, model, "train/target_loss")
    assert losses[STEPS] < losses[1] - 0.05
    assert model.metadata["osft_share"] == 1


def test_a_tuned_model_has_the_settings_of_its_base(world: World) -> None:
    """transformers' Trainer turns the cache off, and every exported model was slow where no generation_config told."""
    tuned = trained(world, "settings", world.mixture, spec_with())
    before, after = (json.loads((world.store.path(model) / "config.json").read_text()) for model in (world.base, tuned))
    assert after == before and after["use_cache"] is True
