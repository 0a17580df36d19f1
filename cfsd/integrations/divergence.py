"""How far a model has moved from where it began, measured while any Trainer trains it."""

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cfsd.errors import BadInput
from cfsd.integrations.corpus import corpus_folder
from cfsd.integrations.rehearsal import BorrowedObjective, check_present
from cfsd.machine import Machine
from cfsd.model.undisturbed import mode_kept
from cfsd.store.tables import read_rows
from cfsd.train.loss.objective import divergence_by_row
from cfsd.train.watcher import MEASURED, micro_batches_from


class DivergenceCallback(TrainerCallback):
    """Logs KL(model as given || model now) in nats per token, along rows that the model itself sampled before.

    Each keyword is a sample and its name in the log: `probe="data/store/corpus/KEY"` gives `probe_kl`. Where rows begin
    with a prompt, as in a chat, the answers count. The model's distributions are taken when the callback is made, so
    it must not have been trained then; the 256 likeliest tokens are exact, the rest is sampled.
    """

    def __init__(self, trainer: Trainer, every: int, *, rows: int = 32, **samples: str | Path) -> None:
        """Measure after every `every` steps and after the last, on the first `rows` rows of each sample."""
        if every < 1 or not samples:
            raise BadInput(
                f"every is {every}, samples are {', '.join(samples) or 'none'}; give a number of steps from 1 on, and "
                "at least one sample, such as probe='data/store/corpus/KEY'"
            )
        self.trainer, self.every = trainer, every
        check_present(trainer.model)
        with trainer.accelerator.autocast():  # some attention takes no float32
            self._objective = BorrowedObjective(trainer.model, MEASURED)
        found = {name: _counted(name, corpus_folder(folder))[:rows] for name, folder in samples.items()}
        most = Machine().micro_batch_tokens
        model = self._objective.model
        with mode_kept(model), trainer.accelerator.autocast():
            model.eval()
            self._samples = {
                name: micro_batches_from(model, [ids for ids, _ in known], most, [mask for _, mask in known])
                for name, known in found.items()
            }  # fmt: skip

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure where it is due."""
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            asked = control.should_log  # which a log takes back, although the trainer's own is yet to come
            Trainer.log(self.trainer, self.measure())  # not the log of a subclass, which empties its own means
            control.should_log = asked

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Return the divergences now, by name. The model's mode and all random states stay as they are."""
        trainer, found = self.trainer, {}
        model = trainer.model_wrapped
        with mode_kept(model), self._objective.borrowed(), trainer.accelerator.autocast():
            model.eval()
            for name, micro_batches in self._samples.items():
                on_device = (send_to_device(part, trainer.args.device) for part in micro_batches)
                nats = sum(float(divergence_by_row(model, part, MEASURED).sum()) for part in on_device)
                found[f"{name}_kl"] = nats / sum(int((part.coefficient_BT != 0).sum()) for part in micro_batches)
        return found


def _counted(name: str, folder: Path) -> list[tuple[list[int], list[bool]]]:
    """Return the rows of which a token counts. Raises BadInput where there is none: chats without an answer."""
    if not (found := [row for row in sampled_rows(folder) if any(row[1])]):
        raise BadInput(
            f"sample {name} ({folder}) has no row of which a token counts: none of its chats has an answer; sample "
            "longer ones (probe.length)"
        )
    return found


def sampled_rows(folder: Path) -> list[tuple[list[int], list[bool]]]:
    """Return each row's tokens, and which of them count: those that were sampled, of a chat those of the answer."""
    begins = {row["row_id"]: row["answer"] for row in read_rows(folder, "turns")}  # a table of chats alone
    found = []
    for row in read_rows(folder, "corpus", ["row_id", "token_ids", "logprobs"]):
        first = begins.get(row["row_id"], 0)
        found.append((row["token_ids"], [n >= first and p is not None for n, p in enumerate(row["logprobs"])]))
    return found
