"""The training loop: transformers.Trainer, with our global batches and objective.

python -m cfsd.train.trainer DRAFT        what the stage starts; DRAFT holds request.json
"""

import json
import math
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from pydantic import JsonValue
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments

from cfsd.errors import NotFinite, Stopped
from cfsd.machine import peak_memory
from cfsd.model.loading import halve_layers, load_model, load_quantised, save_model
from cfsd.model.rounding import EXACT, Rounding, is_rounded, rounding_of
from cfsd.process.child import serve_request
from cfsd.spec import seed_of
from cfsd.stages import ALONG
from cfsd.store.artifact import CHECKPOINTS, Store
from cfsd.store.journal import Journal
from cfsd.train.adapters import KeepDirections, adapt, merge_trained, quantised_note, trained_by
from cfsd.train.arguments import settle_sharding, training_arguments
from cfsd.train.batches.loading import Batches, Share, batches_of
from cfsd.train.batches.micro_batches import MicroBatch
from cfsd.train.batches.mixture import Mask
from cfsd.train.batches.stored_distributions import StoredDistributions, lay_out
from cfsd.train.callbacks import StepRecorder, StopOnSignal
from cfsd.train.controller import Controller
from cfsd.train.dropout import check_dropout, turn_off_dropout
from cfsd.train.loss.objective import Losses, Objective, losses
from cfsd.train.penalties import Anchors, Penalty, penalties_of
from cfsd.train.spec import TrainRequest, TrainSpec
from cfsd.train.watcher import Watcher

DISTRIBUTIONS = "distributions"  # the folder beside the checkpoints, deleted with them


class GlobalBatchTrainer(Trainer):
    """Trainer whose step is a global batch of micro-batches; the loss is already scaled over the whole batch."""

    def __init__(
        self, model: nn.Module, args: TrainingArguments, data: Batches, recorder: StepRecorder,
        penalties: list[Penalty], spec: TrainSpec,
    ) -> None:  # fmt: skip
        """Train `model`, which an Objective has taken over, on `data`; `recorder` gets each step's figures."""
        args.use_cache = getattr(model.config, "use_cache", False)  # Trainer writes it into the model, which is saved
        super().__init__(model=model, args=args, train_dataset=data, callbacks=[StopOnSignal(), recorder])
        if (adapter := spec.methods.adapter()) and adapter.kind == "osf":
            self.add_callback(KeepDirections())
        self.data, self.recorder, self.penalties, self.spec = data, recorder, penalties, spec
        self.controller = recorder.controller

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the shares as they are: accelerate neither shards nor dispatches them."""
        return DataLoader(self.data, batch_size=1, shuffle=False, collate_fn=lambda items: {"share": items[0]})

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: they are not counted."""
        return 0

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Differentiate every micro-batch; gradients are exchanged with the last one, then come the penalties."""
        model.train()
        share: Share = inputs["share"]
        started = time.time()
        weight = self.controller.weight(self.state.global_step)
        sums = torch.zeros(len(Losses._fields), dtype=torch.float64)
        for left, micro_batch in zip(reversed(range(len(share.micro_batches))), share.micro_batches, strict=True):
            # Sharded, what is not exchanged is a whole gradient in every process.
            with self.accelerator.no_sync(model) if left and not self.is_fsdp_enabled else nullcontext():
                sums += self._backward(model, micro_batch, weight)
        if self.data.world > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device), "sum").cpu()
        plain = self.accelerator.unwrap_model(model)
        added = {f"train/penalty/{p.name}": (p.add(plain), p.figure) for p in self.penalties}
        sums[0] += sum(value for value, _ in added.values())
        figures = self._describe(Losses(*sums), share, weight) | {name: figure for name, (_, figure) in added.items()}
        self.recorder.figures = figures | {"train/tokens_per_second": share.counts.tokens / (time.time() - started)}
        return sums[0].to(self.args.device, torch.float32)

    def _backward(self, model: nn.Module, micro_batch: MicroBatch, weight: float) -> Tensor:
        with self.compute_loss_context_manager():
            parts = losses(model, send_to_device(micro_batch, self.args.device), weight)
        self.accelerator.backward(self.data.world * parts.loss)
        return torch.stack([part.detach().double() for part in parts]).cpu()

    def _describe(self, sums: Losses, share: Share, weight: float) -> dict[str, float]:
        """Return the step's figures, and let the controller learn from them."""
        loss, target, rehearsal, divergence = (float(part) for part in sums[:4])
        if not all(map(math.isfinite, (loss, target, rehearsal))):
            raise NotFinite(
                f"the loss is {loss} at step {self.state.global_step + 1}; lower train.learning_rate, "
                "or set train.precision to float32"
            )
        counts, spec, methods = share.counts, self.spec.rehearsal, self.spec.methods
        target_tokens = max(1, counts.target)
        figures = {"train/loss": loss, "train/target_loss": target / target_tokens}
        if methods.factor():
            figures["train/target_weight"] = float(sums.target_weight) / target_tokens
        if methods.divergence():
            figures["train/target_divergence"] = float(sums.target_divergence) / target_tokens
        if counts.rehearsal:
            figures["train/rehearsal_loss"] = rehearsal / counts.rehearsal
            figures["train/rehearsal_token_fraction"] = counts.rehearsal / (counts.rehearsal + counts.target)
            figures["train/rehearsal_row_views"] = sum(share.views) / len(share.views)
        if counts.fresh and (spec.loss == "kl" or spec.budget):
            figures["train/divergence"] = divergence / counts.fresh
            self.controller.learn(divergence, counts.fresh)
            figures["train/divergence_estimate"] = self.controller.estimate or 0.0
        return figures | {"train/rehearsal_weight": weight}

    def _save_rng_state(self, output_dir: str) -> None:
        """Save each process' state before the file that says that the checkpoint is whole."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()


def fit(folder: Path, request: TrainRequest) -> dict[str, JsonValue]:
    """Train as `request` says, in `folder`; return the metadata. Raises Stopped when asked to stop early.

    One of several processes when the environment of `torch.distributed` says so; the first one writes.
    """
    machine, spec, store = request.machine, request.spec, Store(request.home)
    machine.settle(machine.resolved_training_processes())
    torch.manual_seed(seed_of(spec))
    args = training_arguments(spec, folder / CHECKPOINTS, machine)
    data = _data(store, request, folder / CHECKPOINTS / DISTRIBUTIONS, args)
    args.warmup_steps = round(spec.warmup_fraction * len(data))
    base_folder = store.path(request.base)
    model = _trained_base(base_folder, spec, args, is_watched=request.watched is not None)
    put_back = turn_off_dropout(model) if spec.dropout == 0 else lambda: None
    trained = adapt(spec.methods, model)
    adapter = trained_by(model) if spec.methods.adapter() else None
    objective = _objective(model, spec, base_folder, args, sharded=machine.resolved_sharding() == "shard")
    if _shrinks(spec, args):
        _shrink(model, args)
    recorder = _recorder(folder, model, request, args, len(data))
    last = _resumed(folder, recorder, model, args)
    if recorder.stopped_at is not None:  # transformers takes a step before it looks at max_steps: leave none to take
        del data.plan[recorder.stopped_at :]
    args.max_steps = len(data)
    penalties = penalties_of(spec.methods, base_folder, store.path(request.fisher) if request.fisher else None)
    settle_sharding(args, model)
    trainer = GlobalBatchTrainer(trained, args, data, recorder, penalties, spec)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    if trainer.state.global_step < len(data) and recorder.stopped_at is None:
        raise Stopped(f"training stopped after step {trainer.state.global_step} of {len(data)}, which is saved")
    objective.remove()
    put_back()
    rounding = _save(trainer, spec, base_folder, folder)
    share = {f"{adapter.method}_share": adapter.share} if adapter else {}
    notes = [*data.said, *objective.notes, adapter and adapter.note(), quantised_note(spec.methods), rounding.note()]
    said: dict[str, JsonValue] = {"said": [line for line in notes if line]} if any(notes) else {}
    return _metadata(trainer, data, _step_of(last)) | share | rounding.metadata() | said


def _objective(
    model: PreTrainedModel, spec: TrainSpec, base_folder: Path, args: TrainingArguments, *, sharded: bool
) -> Objective:
    """Return the objective, attached to `model`. Raises BadInput for dropout where it would spoil a divergence."""
    live = _live_base(model, base_folder, spec, args)
    objective = Objective(model, spec.rehearsal, live, sharded=sharded, methods=spec.methods, device=args.device)
    if args.bf16 and live is not None and live is not model and not sharded:
        _shrink(live, args)
    check_dropout(spec, drops=objective.drops, sharded=sharded)
    return objective


def _recorder(
    folder: Path, model: PreTrainedModel, request: TrainRequest, args: TrainingArguments, steps: int
) -> StepRecorder:
    store, spec = Store(request.home), request.spec
    with _as_trained(args):
        plain = _plain(model, spec, store.path(request.base)) if request.watched else None
        watcher = Watcher(plain, store, request) if plain else None
    return StepRecorder(Journal(folder), Controller(spec.rehearsal, steps), spec.watch, watcher)


def _resumed(folder: Path, recorder: StepRecorder, model: PreTrainedModel, args: TrainingArguments) -> Path | None:
    """Return the checkpoint that training goes on from, None at the beginning, and put the recorder there."""
    last = last_whole_checkpoint(folder / CHECKPOINTS, delete=args.should_save)
    if args.should_save:
        recorder.journal.cut_back(_step_of(last) if last else -1)  # what was watched at step 0 is watched again
    if last:
        recorder.restore(last)
        if recorder.watcher:
            with _as_trained(args):
                recorder.watcher.measure(model)  # still the base: what changes are counted from
    return last


def _as_trained(args: TrainingArguments) -> torch.autocast:
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16)


def _trained_base(folder: Path, spec: TrainSpec, args: TrainingArguments, *, is_watched: bool) -> PreTrainedModel:
    """Return the base as it is trained, or as an adapter stands beside it.

    It is on the CPU where a GPU is to hold less: halves of its layers, or its own shards, which FSDP moves layer by
    layer. A watcher reads the whole model before that.
    """
    adapter = spec.methods.adapter()
    if adapter is None or adapter.quantise is None:
        less = _shrinks(spec, args) or (args.fsdp and not is_watched)
        return load_model(folder, "cpu" if less else args.device.type, "float32")
    computed_in = torch.bfloat16 if args.bf16 else torch.float32
    return load_quantised(folder, str(args.device), adapter.quantise, computed_in)


def _shrinks(spec: TrainSpec, args: TrainingArguments) -> bool:
    """Say whether the frozen layers beside an adapter are held in the format that they are computed in."""
    adapter = spec.methods.adapter()
    return adapter is not None and adapter.halves(args.bf16)


def _shrink(model: PreTrainedModel, args: TrainingArguments) -> None:
    """Halve the frozen layers, and bring the model to its device: a GPU never holds it in float32.

    Not earlier: trials of a model, as that of its head, pass it outside of autocast.
    """
    halve_layers(model)
    if getattr(model, "hf_quantizer", None) is None:
        nn.Module.to(model, args.device)


def _plain(model: PreTrainedModel, spec: TrainSpec, folder: Path) -> PreTrainedModel:
    """Return the base that divergences are counted from: as it is where `model` is quantised."""
    adapter = spec.methods.adapter()
    return load_model(folder, model.device.type) if adapter and adapter.quantise else model


def _live_base(
    model: PreTrainedModel, folder: Path, spec: TrainSpec, args: TrainingArguments
) -> PreTrainedModel | None:
    """Return the base where its distribution is the reference, in the format that the trained model computes in.

    That is `model` itself where its base is frozen, else float32 under autocast; where weights are sharded, they are
    gathered in bfloat16, all of them.
    """
    adapter = spec.methods.adapter()
    if not spec.needs_base():
        return None
    if adapter and adapter.keeps_the_base():
        return model
    if args.bf16 and args.fsdp:
        base = load_model(folder, args.device.type, "bfloat16")
    else:  # it shrinks to halves before it comes to a GPU
        base = load_model(folder, "cpu" if args.bf16 else args.device.type, "float32")
    base.eval().requires_grad_(False)
    return base


def _data(store: Store, request: TrainRequest, scratch: Path, args: TrainingArguments) -> Batches:
    """Return what this process reads. The first one writes the base's stored distributions to `scratch`, if needed."""
    spec, corpus = request.spec, request.corpus if request.mixture.metadata["rehearsal_rows"] else None
    if corpus and args.should_save:
        lay_out(store.path(corpus), scratch, top=spec.rehearsal.needs_top())
    if request.along and args.should_save:
        lay_out(store.path(request.along), scratch / ALONG, top=True)
    if args.world_size > 1:
        distributed.barrier()
    distributions = StoredDistributions(scratch, store.path(corpus)) if corpus else None
    max_tokens, rank, world = request.machine.micro_batch_tokens, args.process_index, args.world_size
    learned = spec.methods.learned()
    mask = Mask(store.path(request.losses), learned) if request.losses and learned else None
    along = StoredDistributions(scratch / ALONG) if request.along else None
    return batches_of(store, request.mixture, spec, max_tokens, distributions, rank, world, mask=mask, of_target=along)


def _save(trainer: GlobalBatchTrainer, spec: TrainSpec, base_folder: Path, folder: Path) -> Rounding:
    """Write the plain model, by the first process; beside it its float32 weights, where the base has fewer bits."""
    wrapped = trainer.model_wrapped
    state = trainer.accelerator.get_state_dict(wrapped) if trainer.is_fsdp_enabled else None
    if not trainer.args.should_save:
        return Rounding()
    unwrapped, adapter = trainer.accelerator.unwrap_model(wrapped), spec.methods.adapter()
    rounded = _shrinks(spec, trainer.args) or (adapter is not None and adapter.quantise)
    model = merge_trained(spec.methods, unwrapped, folder, base_folder if rounded else None)
    if state is not None:
        model = load_model(base_folder, "cpu", "float32")
        model.load_state_dict(state)
    if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
        raise NotFinite("the trained weights are not finite; lower train.learning_rate")
    rounding = rounding_of(model, Anchors(base_folder).like, base_folder, trainer.args.device.type)
    if is_rounded(base_folder):
        model.save_pretrained(folder / EXACT)
    save_model(model, base_folder, folder)
    return rounding


def _metadata(trainer: GlobalBatchTrainer, data: Batches, continued_from: int) -> dict[str, JsonValue]:
    cuda = trainer.args.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else peak_memory()
    metadata = data.metadata(trainer.state.global_step) | {"continued_from_step": continued_from, "peak_memory": peak}
    controller = trainer.controller
    if budget := trainer.spec.rehearsal.steered_to():
        metadata |= {"budget": budget, "final_weight": controller.weight(len(data))}
        metadata |= {"divergence_estimate": controller.estimate}
    if trainer.recorder.stopped_at is not None:
        metadata |= {"stopped_at_step": trainer.recorder.stopped_at}
    return metadata


def last_whole_checkpoint(folder: Path, *, delete: bool = True) -> Path | None:
    """Return the newest checkpoint that was written to its end; with `delete`, unfinished ones are deleted.

    trainer_state.json is written last: without it, or with half of it, the rest cannot be trusted.
    """
    whole = []
    for path in folder.glob("checkpoint-*"):
        try:
            json.loads((path / "trainer_state.json").read_text())
            whole.append(path)
        except (FileNotFoundError, json.JSONDecodeError):
            if delete:
                shutil.rmtree(path)
    return max(whole, key=_step_of, default=None)


def _step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0


if __name__ == "__main__":
    serve_request(lambda folder, text: fit(folder, TrainRequest.model_validate_json(text)))
