"""What happens around the steps of a training: stopping, checking, watching, recording."""

import json
import math
import signal
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cfsd.errors import NotFinite
from cfsd.store.journal import Journal
from cfsd.train.controller import Controller
from cfsd.train.spec import WATCH, WatchSpec
from cfsd.train.watcher import Watcher

STATE = "train/state/"  # prefix of the figures that a checkpoint must hold, in the last entry of its log


class StopOnSignal(TrainerCallback):
    """SIGTERM and SIGINT, to any process, end the training after the current step, with a checkpoint."""

    def __init__(self) -> None:
        """Take over both signals."""
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save and stop if some process was asked to: all of them must save the same step."""
        if args.world_size > 1:
            asked = torch.tensor(float(self.asked), device=args.device)
            distributed.all_reduce(asked, distributed.ReduceOp.MAX)
            self.asked = bool(asked)
        if self.asked and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True


class StepRecorder(TrainerCallback):
    """Checks each step, watches the model, writes metrics and progress, and ends a training that moved too far.

    The training step leaves its figures in `figures`; `stopped_at` is the step after which the watch ended it.
    """

    def __init__(self, journal: Journal, controller: Controller, watch: WatchSpec, watcher: Watcher | None) -> None:
        """Write to `journal`; the state of `controller` goes into every checkpoint."""
        self.journal, self.controller, self.watch, self.watcher = journal, controller, watch, watcher
        self.figures: dict[str, float] = {}
        self.clipped = 0
        self.stopped_at: int | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: Any
    ) -> None:
        """Measure the model before the first step."""
        if state.global_step == 0:
            self._measure(args, state, control, named["model"])

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: Any) -> None:
        """Record a step. Its checkpoint is written later, so that it holds whether the training ends here."""
        logs: dict[str, float] = named["logs"]
        if "grad_norm" not in logs:
            return
        norm, step = logs["grad_norm"], state.global_step
        if not math.isfinite(norm):
            raise NotFinite(f"the gradient is not finite at step {step}; lower train.learning_rate")
        self.clipped += norm > args.max_grad_norm
        self._measure(args, state, control, named["model"])
        stopped = {} if self.stopped_at is None else {"stopped_at": self.stopped_at}
        saved = {"clipped": self.clipped, **stopped, **self.controller.state()}
        state.log_history[-1] |= {f"{STATE}{name}": value for name, value in saved.items()}
        if args.should_save:
            shared = {"train/gradient_norm": norm, "train/learning_rate": logs["learning_rate"]}
            self.journal.metrics(step, self.figures | shared | {"train/clipped_steps": self.clipped})
            self.journal.progress(step, state.max_steps, "steps")

    def _measure(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module) -> None:
        """Measure the model where it is due; end the training where the divergence is above the limit."""
        step = state.global_step
        if self.watcher is None or (step % self.watch.every and step < state.max_steps):
            return
        figures = self.watcher.measure(model)
        if args.should_save:
            self.journal.metrics(step, figures)
        if self.watch.stop_above and _of_first_process(figures[f"{WATCH}probe_kl"], args) > self.watch.stop_above:
            self.stopped_at = step
            control.should_training_stop = True

    def restore(self, checkpoint: Path) -> None:
        """Continue from what the last entry of the checkpoint's log holds."""
        entry = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"][-1]
        saved = {name.removeprefix(STATE): value for name, value in entry.items() if name.startswith(STATE)}
        self.clipped, self.stopped_at = int(saved["clipped"]), saved.get("stopped_at")
        self.controller.restore(saved)


def _of_first_process(value: float, args: TrainingArguments) -> float:
    """Return the first process' value. Others may differ in the last bit, and all must decide alike."""
    if args.world_size == 1:
        return value
    shared = torch.tensor(value, dtype=torch.float64, device=args.device)
    distributed.broadcast(shared, 0)
    return float(shared)
