"""The training loop: transformers.Trainer, with our global batches, objective and journal."""

import json
import math
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)  # fmt: skip

from cfsd.artifact import CHECKPOINTS, Artifact, Store
from cfsd.batches import GlobalBatch, plan_batches
from cfsd.checkpoint import load_model, save_model
from cfsd.errors import NotFinite, Stopped
from cfsd.journal import Journal, read_metrics
from cfsd.mixture import MixtureRows
from cfsd.objective import Pack, losses, packs_of
from cfsd.train import TrainRequest, TrainSpec

SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


class Batches(Dataset[dict[str, Any]]):
    """One item is one rank's share of one global batch."""

    def __init__(
        self, rows: MixtureRows, plan: list[GlobalBatch], rehearsal_weight: float, most_tokens: int,
        rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        """Cut every global batch of `plan` into packs of at most `most_tokens`."""
        self.rows, self.plan = rows, plan
        self.rehearsal_weight, self.most_tokens = rehearsal_weight, most_tokens
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        """Return the number of optimizer steps."""
        return len(self.plan)

    def __getitem__(self, step: int) -> dict[str, Any]:
        """Return this rank's packs of step `step`, as many as every other rank has."""
        batch = self.plan[step]
        rows = [self.rows[i] for i in (*batch.target, *batch.rehearsal)]
        packs = packs_of(rows, self.rehearsal_weight, self.most_tokens)
        share = packs[self.rank :: self.world]
        if len(share) < -(-len(packs) // self.world):  # a rank without a pack would leave the others waiting
            share.append(packs[0]._replace(coefficient_BT=torch.zeros_like(packs[0].coefficient_BT)))
        counts = {"target": 0, "rehearsal": 0}
        for row in rows:
            counts["target" if row.source == "target" else "rehearsal"] += sum(row.supervised)
        return {"packs": share, "counts": counts, "tokens": sum(len(row.token_ids) for row in rows)}


class StopOnSignal(TrainerCallback):
    """SIGTERM and SIGINT end the training after the step at hand, with a checkpoint."""

    def __init__(self) -> None:
        """Take over both signals."""
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Save and stop if asked to."""
        if self.asked and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
        return control


class RehearsalTrainer(Trainer):
    """Trainer whose step is a global batch of packs; the loss is already scaled over the whole batch."""

    def __init__(self, model: PreTrainedModel, args: TrainingArguments, data: Batches, journal: Journal) -> None:
        """Train `model` on `data` and write metrics to `journal`."""
        super().__init__(model=model, args=args, train_dataset=data, callbacks=[StopOnSignal()])
        self.data, self.journal = data, journal
        self.figures: dict[str, float] = {}
        self.clipped = 0

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the shares as they are: accelerate neither shards nor dispatches them."""
        return DataLoader(self.data, batch_size=1, shuffle=False, collate_fn=lambda items: items[0])

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted."""
        return 0

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Differentiate every pack; gradients are exchanged with the last one."""
        model.train()
        started, packs = time.time(), inputs["packs"]
        sums = torch.zeros(3, dtype=torch.float64)
        for i, pack in enumerate(packs):
            if i + 1 < len(packs):
                with self.accelerator.no_sync(model):
                    sums += self._backward(model, pack)
            else:
                sums += self._backward(model, pack)
        self.figures = self._describe(sums, inputs["counts"], inputs["tokens"], time.time() - started)
        return sums[0].to(self.args.device, torch.float32)

    def _backward(self, model: nn.Module, pack: Pack) -> Tensor:
        device = self.args.device
        with self.compute_loss_context_manager():
            parts = losses(model, Pack(*(tensor.to(device) for tensor in pack)))
        self.accelerator.backward(self.data.world * parts.loss)
        return torch.stack([part.detach().double().cpu() for part in parts])

    def _describe(self, sums: Tensor, counts: dict[str, int], tokens: int, seconds: float) -> dict[str, float]:
        loss, target, rehearsal = sums.tolist()
        if not torch.isfinite(sums).all():
            raise NotFinite(
                f"the loss is {loss} at step {self.state.global_step + 1}; lower train.learning_rate, "
                "or set train.precision to float32"
            )
        figures = {"train/loss": loss, "train/target_loss": target / max(1, counts["target"])}
        if counts["rehearsal"]:
            figures["train/rehearsal_loss"] = rehearsal / counts["rehearsal"]
            figures["train/rehearsal_token_fraction"] = counts["rehearsal"] / sum(counts.values())
        figures["train/rehearsal_weight"] = self.data.rehearsal_weight
        return figures | {"train/tokens_per_second": tokens / seconds}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write one step's figures to the journal."""
        super().log(logs, start_time)
        if "grad_norm" not in logs:
            return
        norm, step = logs["grad_norm"], self.state.global_step
        if not math.isfinite(norm):
            raise NotFinite(f"the gradient is not finite at step {step}; lower train.learning_rate")
        self.clipped += norm > self.args.max_grad_norm
        shared = {"train/gradient_norm": norm, "train/learning_rate": logs["learning_rate"]}
        self.journal.metrics(step, self.figures | shared | {"train/clipped_steps": self.clipped})
        self.journal.progress(step, self.state.max_steps, "steps")


def fit(folder: Path, request: TrainRequest) -> dict[str, JsonValue]:
    """Train as `request` says, in `folder`; return the facts. Raises Stopped when asked to stop early."""
    machine, spec, store = request.machine, request.spec, Store(request.home)
    machine.settle()
    torch.manual_seed(spec.seed or 0)
    device = machine.resolved_device()
    base_folder = store.path(request.base)
    model = load_model(base_folder, device, "float32")
    data = batches_of(store, request.mixture, spec, machine.micro_batch_tokens)
    checkpoints = folder / CHECKPOINTS
    last = last_whole_checkpoint(checkpoints)
    journal = Journal(folder)
    journal.cut_back(_step_of(last))
    trainer = RehearsalTrainer(model, _arguments(spec, checkpoints, device, len(data), machine.checkpoint_steps),
                               data, journal)  # fmt: skip
    clipped = [r["value"] for r in read_metrics(folder) if r["name"] == "train/clipped_steps"]
    trainer.clipped = int(clipped[-1]) if clipped else 0
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    if trainer.state.global_step < len(data):
        raise Stopped(f"training stopped after step {trainer.state.global_step} of {len(data)}, which is saved")
    if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
        raise NotFinite("the trained weights are not finite; lower train.learning_rate")
    save_model(model, base_folder, folder)
    tokens = sum(data[step]["tokens"] for step in range(len(data)))
    return {"steps": len(data), "tokens": tokens, "continued_from_step": _step_of(last)}


def batches_of(store: Store, mixture: Artifact, spec: TrainSpec, most_tokens: int) -> Batches:
    """Return the global batches of the whole training."""
    facts: dict[str, Any] = mixture.facts
    rows = MixtureRows(store.path(mixture))
    plan = plan_batches(
        rows.sources(),
        rows.supervised_tokens(),
        target_rows=facts["batch_target_rows"],
        rehearsal_tokens=facts["batch_rehearsal_tokens"] if spec.rehearsal_weight else 0,
        epochs=spec.epochs,
        seed=facts["seed"],
    )
    return Batches(rows, plan, spec.rehearsal_weight, most_tokens)


def _arguments(spec: TrainSpec, checkpoints: Path, device: str, steps: int, save_steps: int) -> TrainingArguments:
    bfloat16 = spec.precision == "bfloat16" or (spec.precision == "auto" and device == "cuda")
    return TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=steps,
        learning_rate=spec.learning_rate,
        lr_scheduler_type=SCHEDULES[spec.schedule],
        warmup_steps=round(spec.warmup_fraction * steps),
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.clip_norm,
        bf16=bfloat16,
        use_cpu=device == "cpu",
        save_strategy="steps",
        save_steps=save_steps,
        save_total_limit=1,
        logging_steps=1,
        logging_nan_inf_filter=False,
        gradient_accumulation_steps=1,
        seed=spec.seed or 0,
        report_to=[],
        disable_tqdm=True,
    )


def last_whole_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that was written to its end; unfinished ones are deleted.

    trainer_state.json is written last: without it, or with half of it, the rest cannot be trusted.
    """
    whole = []
    for path in folder.glob("checkpoint-*"):
        try:
            json.loads((path / "trainer_state.json").read_text())
            whole.append(path)
        except (FileNotFoundError, json.JSONDecodeError):
            shutil.rmtree(path)
    return max(whole, key=_step_of, default=None)


def _step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0
