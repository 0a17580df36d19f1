"""Rehearsal in other people's trainings is that of a recipe: same rows, same loss, same weights."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import AttentionInterface, AttentionMaskInterface, TrainingArguments
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.training_args import OptimizerNames

from cfsd.errors import BadInput
from cfsd.evaluate.divergence import divergence
from cfsd.generate.spec import GenerateSpec
from cfsd.generate.stage import generate
from cfsd.integrations.corpus import corpus_folder
from cfsd.integrations.divergence import DivergenceCallback, sampled_rows
from cfsd.integrations.rehearsal import SCRATCH, RehearsalTrainer, Rehearsing, check_training
from cfsd.model.loading import load_model
from cfsd.store.artifact import Store
from cfsd.store.tables import CORPUS, read_rows, table_of, write_shard
from tests.conftest import ROOT, save_model, write_rows
from tests.train.test_train import (
    BATCH,
    MACHINE,
    STEPS,
    Plain,
    World,
    collate,
    distance,
    figures,
    spec_with,
    trained,
    weights,
    world_in,
)
from tests.train.test_train import signals_given_back as signals_given_back

TOKENS = 96  # of `world_in`


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> World:
    folder = tmp_path_factory.mktemp("world")
    return world_in(Store(folder / "data"), model_folder, write_rows(folder / "rows.jsonl", count=48), corpus_rows=30)


class InOrder(Rehearsing):
    """Takes target rows in the order in which they are given."""

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


class Ordered(InOrder, RehearsalTrainer):
    pass


def arguments(folder: Path, **given: Any) -> dict[str, Any]:
    """What a training of `tests.train.test_train.SPEC` is in the arguments of transformers."""
    plain: dict[str, Any] = {
        "output_dir": str(folder), "per_device_train_batch_size": BATCH, "num_train_epochs": 1, "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine", "warmup_steps": round(0.03 * STEPS), "max_grad_norm": 1.0, "use_cpu": True,
        "seed": 0, "report_to": [], "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
    }  # fmt: skip
    return plain | given


def base_of(world: World) -> Any:
    return load_model(world.store.path(world.base), "cpu", "float32")


def trainer_of(world: World, folder: Path, model: Any = None, *, given: Any = (), **rehearsal: Any) -> Ordered:
    args = TrainingArguments(**arguments(folder, **dict(given)))
    chosen = {"corpus": world.store.path(world.corpus), "rehearsal_tokens": TOKENS} | rehearsal
    model = base_of(world) if model is None else model
    return Ordered(model=model, args=args, train_dataset=Plain(world), data_collator=collate, **chosen)


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def state_of(trainer: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


@pytest.mark.parametrize("loss", ["kl", "nll"])
def test_it_is_the_training_of_a_recipe(world: World, tmp_path: Path, loss: Any) -> None:
    """Ten steps: weights, losses and divergences are those of our own trainer on the same rows."""
    trainer = trainer_of(world, tmp_path, loss=loss, weight=0.7)
    trainer.train()
    trainer.save_model()
    ours = trained(world, f"recipe {loss}", world.mixture, spec_with(rehearsal={"loss": loss, "weight": 0.7}))
    assert distance(load_file(tmp_path / "model.safetensors"), weights(world, ours)) < 1e-5
    assert distance(load_file(tmp_path / "model.safetensors"), weights(world, world.base)) > 1e-3
    for theirs, name in (("loss", "loss"), ("target_loss", "target_loss"), ("rehearsal_loss", "rehearsal_loss")):
        wanted = list(figures(world, ours, f"train/{name}").values())
        assert len(wanted) == STEPS and logged(trainer, theirs) == pytest.approx(wanted, abs=1e-5)
    if loss == "kl":
        wanted = list(figures(world, ours, "train/divergence").values())
        assert 1 < len(wanted) < STEPS and logged(trainer, "rehearsal_divergence") == pytest.approx(wanted, abs=1e-5)


def test_without_weight_it_is_the_trainer_itself(world: World, tmp_path: Path) -> None:
    trainer = trainer_of(world, tmp_path, weight=0.0)
    trainer.train()
    ours = trained(world, "plain", world.plain)
    assert distance(state_of(trainer), weights(world, ours)) < 1e-5
    assert not logged(trainer, "rehearsal_loss")


@pytest.mark.parametrize("accumulated", [2, 8])
def test_accumulated_batches_rehearse_once_a_step(world: World, tmp_path: Path, accumulated: int) -> None:
    whole = trainer_of(world, tmp_path)
    whole.train()
    sizes = {"gradient_accumulation_steps": accumulated, "per_device_train_batch_size": BATCH // accumulated}
    parts = trainer_of(world, tmp_path, given=sizes)
    parts.train()
    assert distance(state_of(parts), state_of(whole)) < 1e-5
    for name in ("loss", "target_loss", "rehearsal_loss"):
        assert logged(parts, name) == pytest.approx(logged(whole, name), abs=1e-5)


def test_a_resumed_training_goes_on_with_its_rows(world: World, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 4, "logging_steps": 2}
    whole = trainer_of(world, tmp_path / "whole", given=saving)
    whole.train()
    assert not (tmp_path / "whole" / SCRATCH).exists()
    resumed = trainer_of(world, tmp_path / "whole", given=saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert all(torch.equal(own, state_of(whole)[name]) for name, own in state_of(resumed).items())
    assert logged(resumed, "rehearsal_loss") == logged(whole, "rehearsal_loss")


def test_evaluation_rehearses_nothing(world: World, tmp_path: Path) -> None:
    rehearsed = trainer_of(world, tmp_path)
    rehearsed.eval_dataset = Plain(world)  # type: ignore[assignment]
    before = state_of(rehearsed)
    found = rehearsed.evaluate()
    wanted = figures(world, trained(world, "plain", world.plain), "train/target_loss")
    assert found["eval_loss"] == pytest.approx(next(iter(wanted.values())), rel=0.2)  # of all rows, not of eight
    assert not any("rehearsal" in name for name in found)
    assert all(torch.equal(before[name], tensor) for name, tensor in rehearsed.model.state_dict().items())


def test_the_saved_model_is_as_the_trainer_would_save_it(world: World, tmp_path: Path) -> None:
    trainer = trainer_of(world, tmp_path, given={"max_steps": 1})
    trainer.train()
    trainer.save_model()
    assert "cfsd" not in (tmp_path / "config.json").read_text()
    assert "forward" not in vars(trainer.model)


def test_an_adapter_alone_is_trained_and_dropout_spares_rehearsal(world: World, tmp_path: Path) -> None:
    """At the base's weights the divergence is that of rounding, in spite of dropout on the target's rows."""
    torch.manual_seed(0)
    before = weights(world, world.base)
    model = get_peft_model(base_of(world), LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear"))
    trainer = trainer_of(world, tmp_path, model, given={"learning_rate": 1e-2})
    trainer.train()
    divergences = logged(trainer, "rehearsal_loss")
    assert divergences[0] < 1e-4 < max(divergences)
    assert distance(weights(world, world.base), before) == 0 and "lora_A" in " ".join(trainer.model.state_dict())


def test_noise_in_the_embeddings_spares_rehearsal(world: World, tmp_path: Path) -> None:
    trainer = trainer_of(world, tmp_path, given={"neftune_noise_alpha": 50.0, "max_steps": 1})
    trainer.train()
    assert logged(trainer, "rehearsal_loss")[0] < 1e-4


def test_the_callback_logs_the_divergence_along_each_sample(world: World, tmp_path: Path) -> None:
    """A model that has not changed is at 0; then each sample has the whole divergence along its sampled tokens."""
    trainer = trainer_of(world, tmp_path, given={"logging_steps": 5})
    samples = {"probe": world.store.path(world.sample), "chat": answers_in(world)}
    callback = DivergenceCallback(trainer, every=4, rows=24, **samples)
    trainer.add_callback(callback)
    assert all(abs(value) < 1e-5 for value in callback.measure().values())
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "probe_kl" in entry] == [4, 8, STEPS]
    for name, folder in samples.items():
        assert logged(trainer, f"{name}_kl")[-1] == pytest.approx(divergence_along(world, trainer, folder), rel=1e-3)
    assert trainer.model.training


@pytest.mark.parametrize("every", [2, 4])
def test_the_callback_leaves_the_trainers_own_log_alone(world: World, tmp_path: Path, every: int) -> None:
    trainer = trainer_of(world, tmp_path, given={"logging_steps": 2, "max_steps": 4})
    trainer.add_callback(DivergenceCallback(trainer, every=every, probe=world.store.path(world.sample)))
    trainer.train()
    steps = {name: [e["step"] for e in trainer.state.log_history if name in e] for name in ("probe_kl", "loss")}
    assert steps == {"probe_kl": list(range(every, 5, every)), "loss": [2, 4]}


def divergence_along(world: World, trainer: Any, folder: Path) -> float:
    rows = read_rows(folder, "corpus", ["token_ids", "logprobs"])
    masks = [[value is not None for value in row["logprobs"]] for row in rows]
    assert len({sum(mask) - len(mask) for mask in masks}) == (1 if folder.name == "sample" else 4)  # prompts
    parts = divergence(base_of(world), trainer.model.eval(), [row["token_ids"] for row in rows], masks)
    trainer.model.train()
    return sum(part.kl for part in parts) / sum(part.num_tokens for part in parts)


def answers_in(world: World) -> Path:
    """A sample whose rows begin with prompts."""
    spec = GenerateSpec(rows=12, length=8, seed=3, source="contextual")
    work = lambda draft: generate(world.base, world.target, spec, draft, MACHINE)  # noqa: E731
    return world.store.path(world.store.make("corpus", "answers", work)[0])


def test_of_a_chat_the_answer_counts(tmp_path: Path) -> None:
    """`turns` says where it begins: the user's turn was sampled, too."""
    plain = {"source": "chat", "finish_reason": "eos", "shard": 0, "seed": 0, "text": ""}
    rows = [
        plain | {"row_id": n, "token_ids": [0, 5, 6, 7, 8], "logprobs": [None, -1.0, None, -1.0, -1.0]} for n in (4, 2)
    ]
    write_shard(tmp_path, "corpus", 0, table_of(CORPUS, rows))
    assert [mask for _, mask in sampled_rows(tmp_path)] == [[False, True, False, True, True]] * 2
    write_shard(tmp_path, "turns", 0, pa.table({"row_id": [2, 4], "answer": [5, 3]}))
    assert sampled_rows(tmp_path) == [([0, 5, 6, 7, 8], [False] * 3 + [True] * 2), ([0, 5, 6, 7, 8], [False] * 5)]


def test_chats_without_an_answer_are_left_out_and_refused_where_there_are_no_others(
    world: World, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(answers_in(world), tmp_path / "chats"))
    rows = read_rows(folder, "corpus", ["row_id", "token_ids"])
    trainer = trainer_of(world, tmp_path)
    for answered in (2, 0):  # of the last rows
        ends = [len(row["token_ids"]) for row in rows]
        first = [end if place < len(rows) - answered else end - 2 for place, end in enumerate(ends)]
        write_shard(folder, "turns", 0, pa.table({"row_id": [row["row_id"] for row in rows], "answer": first}))
        if answered:
            assert DivergenceCallback(trainer, every=1, rows=2, chat=folder).measure()["chat_kl"] < 1e-5
        else:
            with pytest.raises(BadInput, match=r"sample chat .* has no row of which a token counts"):
                DivergenceCallback(trainer, every=1, chat=folder)


def test_without_a_sample_or_steps_there_is_nothing_to_log(world: World, tmp_path: Path) -> None:
    trainer = trainer_of(world, tmp_path)
    for wrong in ({"every": 0, "probe": world.store.path(world.sample)}, {"every": 1}):
        with pytest.raises(BadInput, match="give a number of steps"):
            DivergenceCallback(trainer, **wrong)


def corpus_of(world: World, key: str, **spec: Any) -> Path:
    wanted = GenerateSpec.model_validate({"rows": 6, "length": 8, "seed": 3} | spec)
    work = lambda draft: generate(world.base, world.target, wanted, draft, MACHINE)  # noqa: E731
    return world.store.path(world.store.make("corpus", key, work, inputs=[world.base])[0])


def test_a_corpus_is_named_by_its_key(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFSD_HOME", str(world.store.home))
    key = "ab12ab12ab12ab12"
    folder = corpus_of(world, key, top_logprobs=4)
    assert corpus_folder(key[:6]) == corpus_folder(f"corpus/{key}") == corpus_folder(folder) == folder
    with pytest.raises(BadInput, match="nothing in the store is named 'ffff'"):
        corpus_folder("ffff")
    with pytest.raises(BadInput, match=r"holds no corpus; give a folder store/corpus/KEY"):
        trainer_of(world, tmp_path, corpus=tmp_path)


def test_a_corpus_that_lacks_what_the_loss_reads_is_refused(world: World, tmp_path: Path) -> None:
    bare = corpus_of(world, "bare")
    with pytest.raises(BadInput, match=r"bare stores no distributions: make it with generate.top_logprobs"):
        trainer_of(world, tmp_path, corpus=bare)
    trainer_of(world, tmp_path, corpus=bare, loss="nll")
    drawn = {"top_logprobs": 4, "tail_samples": 0}
    trainer_of(world, tmp_path, corpus=corpus_of(world, "drawn", **drawn))
    warm = corpus_of(world, "warm", temperature=0.7, **drawn)
    with pytest.raises(BadInput, match=r"warm has no samples of the tail, and its rows are not known to follow"):
        trainer_of(world, tmp_path, corpus=warm)
    trainer_of(world, tmp_path, corpus=warm, tail="bucket")


def test_a_corpus_of_another_model_is_refused(world: World, tmp_path: Path) -> None:
    other = load_model(save_model(tmp_path / "other", seed=1), "cpu", "float32")
    corpus, name = corpus_of(world, "9" * 16, top_logprobs=4), f"LlamaForCausalLM, {world.base.key}"
    with pytest.raises(BadInput, match=rf"nats per token less than .* sampled from \({name}\); at most 0.1 apart"):
        trainer_of(world, tmp_path, other, corpus=corpus)
    trainer_of(world, tmp_path, other, max_gap=50.0)
    small = load_model(save_model(tmp_path / "small", bos=False), "cpu", "float32")  # lacks the last token
    with pytest.raises(BadInput, match="has token 31, but the model's vocabulary ends at 30: it was sampled from"):
        trainer_of(world, tmp_path, small)


PROMPTS = SimpleNamespace(active_peft_config=SimpleNamespace(is_prompt_learning=True))


@pytest.mark.parametrize(("change", "named"), [
    ({"accelerator.distributed_type": DistributedType.DEEPSPEED}, "DeepSpeed, which takes"),
    ({"accelerator.parallelism_config": object()}, "tensor, context or sequence parallelism"),
    ({"args.n_gpu": 2}, "nn.DataParallel, one process with several GPUs"),
    ({"args.torch_compile": True}, "torch_compile, which"),
    ({"args.auto_find_batch_size": True}, "auto_find_batch_size, which takes the first step again"),
    ({"args.optim": OptimizerNames.GALORE_ADAMW_LAYERWISE}, "a layer-wise optimizer or LOMO"),
    ({"args.optim": "adalomo"}, "a layer-wise optimizer or LOMO"),
    ({"is_model_parallel": True}, "a model that is spread over several devices"),
    ({"model_init": lambda: None}, "model_init, which makes a new model"),
    ({"model": PROMPTS}, "PEFT's prompt learning"),
])  # fmt: skip
def test_trainings_in_which_it_would_be_wrong_are_refused(change: dict[str, Any], named: str) -> None:
    accelerator = SimpleNamespace(distributed_type=DistributedType.NO, parallelism_config=None)
    args = SimpleNamespace(n_gpu=1, torch_compile=False)
    trainer = SimpleNamespace(accelerator=accelerator, args=args, model=SimpleNamespace(), model_init=None)
    check_training(trainer)
    for name, value in change.items():
        holder, _, attribute = name.rpartition(".")
        setattr(getattr(trainer, holder) if holder else trainer, attribute, value)
    with pytest.raises(BadInput, match=f"rehearsal does not work with {named}"):
        check_training(trainer)


def test_a_model_whose_weights_are_elsewhere_is_refused(world: World, tmp_path: Path) -> None:
    """As on all processes but the first under FSDP with cpu_ram_efficient_loading."""
    trainer = trainer_of(world, tmp_path)
    trainer.model.to("meta")
    with pytest.raises(BadInput, match="set fsdp_cpu_ram_efficient_loading: false"):
        DivergenceCallback(trainer, every=1, probe=world.store.path(world.sample))


def no_float32(module: Any, query: Tensor, key: Tensor, value: Tensor, *more: Any, **named: Any) -> Any:
    """Attention as FlashAttention's is called by transformers: cast under autocast, refused otherwise."""
    if query.dtype == torch.float32:
        assert torch.is_autocast_enabled("cpu"), "FlashAttention only supports fp16 and bf16"
        query, key, value = (part.bfloat16() for part in (query, key, value))
    return sdpa_attention_forward(module, query, key, value, *more, **named)


def test_an_attention_that_takes_no_float32_is_only_used_under_autocast(world: World, tmp_path: Path) -> None:
    AttentionInterface.register("no_float32", no_float32)
    AttentionMaskInterface.register("no_float32", sdpa_mask)
    model = base_of(world)
    model.set_attn_implementation("no_float32")
    trainer = trainer_of(world, tmp_path, model, given={"bf16": True, "max_steps": 2})
    trainer.add_callback(DivergenceCallback(trainer, every=1, probe=world.store.path(world.sample)))
    trainer.train()
    assert len(logged(trainer, "rehearsal_loss")) == len(logged(trainer, "probe_kl")) == 2


class Averaging(torch.optim.SGD):
    """As schedule-free optimizers: evaluation is at other weights until the next call of train()."""

    mode = "train"

    def train(self) -> None:
        self.mode = "train"

    def eval(self) -> None:
        self.mode = "eval"


def test_rehearsal_is_at_the_weights_that_are_trained_after_an_evaluation_at_others(
    world: World, tmp_path: Path
) -> None:
    given = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    trainer = trainer_of(world, tmp_path, given=given, eval_dataset=Plain(world))
    trainer.optimizer = Averaging(trainer.model.parameters(), lr=1e-3)
    seen, share = [], trainer._share
    trainer._share = lambda: (seen.append(trainer.optimizer.optimizer.mode), share())[1]
    trainer.train()
    assert seen == ["train"] * 3 and len(logged(trainer, "eval_loss")) == 3


@pytest.mark.slow
def test_two_processes_train_as_one_does(world: World, tmp_path: Path) -> None:
    """DDP over gloo, accumulating: the gradient is the mean over ranks, of which one may have no rehearsal rows."""
    sizes = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": BATCH // 2}
    alone = trainer_of(world, tmp_path / "one", given=sizes)
    alone.train()
    request = {"base": world.store.path(world.base), "corpus": world.store.path(world.corpus),
               "rows": list(Plain(world).rows), "tokens": TOKENS, "folder": tmp_path / "two"}  # fmt: skip
    torch.save(request, tmp_path / "request.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = str(Path(__file__).with_name("two_processes.py"))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([*command, script, str(tmp_path / "request.pt")], check=True, cwd=ROOT, env=environment)
    assert distance(state_of(alone), load_file(tmp_path / "two" / "model.safetensors")) < 1e-5
    found = json.loads((tmp_path / "two" / "log.json").read_text())
    for name in ("loss", "target_loss", "rehearsal_loss", "rehearsal_divergence"):
        assert [entry[name] for entry in found if name in entry] == pytest.approx(logged(alone, name), abs=1e-5)
