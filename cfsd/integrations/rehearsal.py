"""Rehearsal in a training with transformers' Trainer, or with a class made from it.

Each optimizer step gets, on top of the gradient that it has anyway, that of weight x the mean loss per token over
rehearsal rows of a stored corpus: with the same rows the same as the training of a recipe (`cfsd.train`). How the
target's loss is computed, padded, packed or accumulated is left to the trainer.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import DistributedType, send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from cfsd.errors import BadInput
from cfsd.integrations.corpus import CorpusRows, check_base, check_stored, corpus_folder
from cfsd.machine import Machine
from cfsd.train.batches.global_batches import GlobalBatch, plan_batches
from cfsd.train.batches.loading import Batches, Share
from cfsd.train.batches.stored_distributions import StoredDistributions, lay_out
from cfsd.train.loss.objective import Objective, losses
from cfsd.train.spec import RehearsalSpec

SCRATCH = "_rehearsal"  # below output_dir, while it trains; transformers uploads nothing that begins with _
MAX_GAP = 0.1  # nats per token


class BorrowedObjective(Objective):
    """An Objective that has the model's forward pass only while it is asked: the rest of a training keeps its own."""

    def __init__(self, model: Any, spec: RehearsalSpec) -> None:
        """Look at `model`, a PreTrainedModel or what PEFT made of one."""
        plain: PreTrainedModel = getattr(model, "get_base_model", lambda: model)()
        self._own = plain.__dict__.get("forward")  # where TRL or accelerate put one
        super().__init__(plain, spec)
        self._give_back()

    def _give_back(self) -> None:
        del self.model.forward
        if self._own is not None:
            self.model.forward = self._own

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Take over the model's forward pass for the block."""
        self._own = self.model.__dict__.get("forward")
        self.model.forward = self.forward
        try:
            yield
        finally:
            self._give_back()


class Rehearsing(Trainer):
    """Adds rehearsal to the training of the Trainer class that follows it in the bases of a class.

    Every step rehearses the rows that a recipe with the same seed and mix.rehearsal_tokens would, in whole rows; their
    order follows from the number of the step, so that a resumed training goes on where it was. Evaluation is as it
    was. In the log: `rehearsal_loss`, `target_loss` (the rest of `loss`, which is the sum) and, for rows that were not
    seen before, `rehearsal_divergence` from the base; all in nats per token.
    """

    def __init__(
        self, *args: Any, corpus: str | Path, weight: float = 1.0, loss: Literal["kl", "nll"] = "kl",
        tail: Literal["sampled", "bucket"] = "sampled", rehearsal_tokens: int = 1024, max_gap: float = MAX_GAP,
        **named: Any,
    ) -> None:  # fmt: skip
        """Take what the Trainer class takes, and how to rehearse.

        `corpus` is the folder of a corpus, or its key; `weight`, `loss` and `tail` are as in a recipe's
        train.rehearsal. `rehearsal_tokens` is how many tokens an optimizer step rehearses at most, over all devices
        and accumulated batches. The model must be the corpus' base: their log-probabilities of the same tokens may
        differ by `max_gap` nats per token on average.

        Raises:
            BadInput: the corpus is not there, lacks what the loss reads, or was sampled from another model; or the
                model is trained in a way in which rehearsal does not work.
        """
        self.rehearsal = RehearsalSpec(weight=weight, loss=loss, tail=tail)
        self.corpus = corpus_folder(corpus)
        self.rehearsal_tokens = rehearsal_tokens
        check_stored(self.corpus, self.rehearsal)
        super().__init__(*args, **named)
        check_training(self)
        check_present(self.model)
        self._rows = CorpusRows(self.corpus)
        with self.accelerator.autocast():  # some attention takes no float32
            self._objective = BorrowedObjective(self.model, self.rehearsal)
            check_base(self.corpus, self._objective.model, max_gap)
        if self.args.neftune_noise_alpha:  # noise in the embeddings, from a hook of the training mode
            self._objective.drops = self._objective.apart = True
        self._batches: Batches | None = None
        self._rehearsed_step = -1
        self._since_log: list[list[float]] = []  # of each step, this process' share of loss, divergence and its tokens

    def train(self, *args: Any, **named: Any) -> Any:
        """Train, as the Trainer class does; the corpus lies uncompressed below output_dir while it trains."""
        scratch = Path(str(self.args.output_dir)) / SCRATCH
        with self.args.main_process_first(local=self.args.save_on_each_node, desc="laying out the corpus"):
            if self.args.should_save:
                lay_out(self.corpus, scratch, top=self.rehearsal.needs_top())
        self._distributions, self._batches = StoredDistributions(scratch, self.corpus), None
        self._rehearsed_step = -1
        self._since_log.clear()
        try:
            return super().train(*args, **named)
        finally:
            if self.args.should_save:  # other processes have mapped the file
                shutil.rmtree(scratch, ignore_errors=True)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Differentiate the step's rehearsal, before the first of the batches that it accumulates, then the batch."""
        added: Tensor | float = 0.0
        if self.rehearsal.weight and self._rehearsed_step != self.state.global_step:
            self._rehearsed_step = self.state.global_step
            added = self._rehearse(model)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss + added

    def _rehearse(self, model: nn.Module) -> Tensor:
        """Add the gradient of this process' share, exchanged with that of the batches; return its part of the loss.

        Processes' gradients, and losses, are averaged: each counts as many times as there are processes.
        """
        model.train()
        if callable(to_training := getattr(self.optimizer, "train", None)):  # schedule-free: back from its averages
            to_training()
        share = self._share()
        total = divergence = 0.0
        alone = nullcontext() if self.is_fsdp_enabled else self.accelerator.no_sync(model)
        with alone, self._objective.borrowed():
            for micro_batch in share.micro_batches:
                with self.accelerator.autocast():
                    parts = losses(model, send_to_device(micro_batch, self.args.device), self.rehearsal.weight)
                self.accelerator.backward(self._world() * parts.loss)
                total, divergence = total + float(parts.loss.detach()), divergence + float(parts.divergence)
        self._since_log.append([total, divergence, share.counts.fresh / self._world()])
        return torch.tensor(self._world() * total, device=self.args.device)

    def _world(self) -> int:
        return int(self.accelerator.num_processes)

    def _share(self) -> Share:
        """Return this process' rehearsal rows of the step that begins."""
        if self._batches is None or len(self._batches) < self.state.max_steps:
            plan = rehearsal_plan(self._rows, self.rehearsal_tokens, self.state.max_steps, self._seed())
            most = min(Machine().micro_batch_tokens, -(-self.rehearsal_tokens // self._world()))
            here = self.accelerator.process_index, self._world()
            self._batches = Batches(self._rows, plan, most, self._distributions, *here)
        return self._batches[self.state.global_step]

    def _seed(self) -> int:
        return int(self.args.seed if self.args.data_seed is None else self.args.data_seed)

    def log(self, logs: dict[str, float], *args: Any, **named: Any) -> None:
        """Log `logs`, and what was rehearsed since the last time."""
        if "loss" in logs and self._since_log:
            steps, sums = len(self._since_log), torch.tensor(self._since_log, device=self.args.device).sum(0)
            total, divergence, fresh = self.accelerator.reduce(sums, "sum").tolist()
            logs |= {"target_loss": logs["loss"] - total / steps}
            logs |= {"rehearsal_loss": total / steps / self.rehearsal.weight}
            if round(fresh):
                logs |= {"rehearsal_divergence": divergence / fresh}
            self._since_log.clear()
        super().log(logs, *args, **named)


class RehearsalTrainer(Rehearsing):
    """transformers' Trainer with rehearsal; see `Rehearsing`."""


def rehearsal_plan(rows: CorpusRows, tokens: int, steps: int, seed: int) -> list[GlobalBatch]:
    """Return which rows each step rehearses: those of a recipe's training of as many steps."""
    plan = plan_batches(
        ["target"] * steps + rows.sources(), [1] * steps + rows.supervised_tokens(), target_rows=1,
        rehearsal_tokens=tokens, epochs=1, seed=seed,
    )  # fmt: skip
    return [GlobalBatch([], [row - steps for row in batch.rehearsal], batch.views) for batch in plan]


def check_training(trainer: Any) -> None:
    """Raise BadInput where rehearsal would be computed wrongly without a word."""
    accelerator, peft_config = trainer.accelerator, getattr(trainer.model, "active_peft_config", None)
    reasons = {
        "DeepSpeed, which takes an optimizer step with every backward pass": accelerator.distributed_type
        == DistributedType.DEEPSPEED,
        "tensor, context or sequence parallelism": getattr(accelerator, "parallelism_config", None) is not None,
        "a layer-wise optimizer or LOMO, which takes a step with every backward pass": any(
            kind in str(getattr(trainer.args, "optim", "")).lower() for kind in ("layerwise", "lomo")
        ),
        "nn.DataParallel, one process with several GPUs": trainer.args.n_gpu > 1,
        "a model that is spread over several devices (device_map)": getattr(trainer, "is_model_parallel", False),
        "torch_compile, which would not see that the forward pass changes": trainer.args.torch_compile,
        "auto_find_batch_size, which takes the first step again and would not rehearse in it": getattr(
            trainer.args, "auto_find_batch_size", False
        ),
        "model_init, which makes a new model after the corpus was compared with one": trainer.model_init is not None,
        "PEFT's prompt learning, whose prompt rehearsal rows would not have": getattr(
            peft_config, "is_prompt_learning", False
        ),
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise BadInput(
            f"rehearsal does not work with {found[0]}; allowed: one process, several under torchrun or accelerate "
            "launch (DDP, FSDP), with or without LoRA"
        )


def check_present(model: Any) -> None:
    """Raise BadInput where the weights of `model` are with another process, so that nothing can be tried with it."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise BadInput(
            "the model has no weights in this process, as with FSDP's cpu_ram_efficient_loading; set "
            "fsdp_cpu_ram_efficient_loading: false, so that every process loads them"
        )
