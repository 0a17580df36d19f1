"""The weight of the tuned model with which the merged one keeps a budget of divergence."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from cfsd.budget import MERGED_TO
from cfsd.errors import NotFinite
from cfsd.evaluate.divergence import divergences
from cfsd.machine import Machine
from cfsd.merge.spec import MergeSpec
from cfsd.merge.stage import interpolated
from cfsd.model.loading import load_model, release_models, stored_precision
from cfsd.store.artifact import Artifact, Draft
from cfsd.store.digests import write_json
from cfsd.store.tables import read_rows

CLOSE = 0.03  # of the aim: finer than a control sample can distinguish
MAX_TRIES = 10
POWER = 1.5  # of alpha in the divergence, to begin with: near the tuned model 1.0 to 1.7 was measured, near the base 2


class Tried(NamedTuple):
    """A merged model: the tuned model's weight in it, and its divergence from the base in nats per token."""

    alpha: float
    nats: float


def largest_alpha(measure: Callable[[float], float], max_alpha: float, budget: float) -> list[Tried]:
    """Return the weights tried, in order; the last one keeps `budget` as `measure` sees it, and is to be taken.

    `max_alpha` is taken if it keeps the budget; else the divergence is brought within CLOSE of MERGED_TO x budget.
    """
    tried = [Tried(max_alpha, measure(max_alpha))]
    if tried[0].nats <= budget:
        return tried
    below, above, power, aim = Tried(0.0, 0.0), tried[0], POWER, MERGED_TO * budget
    while not _is_close(tried[-1].nats, aim) and len(tried) < MAX_TRIES:
        last = tried[-1]
        alpha = last.alpha * (aim / last.nats) ** (1 / power) if last.nats > 0 else 0.0
        if not below.alpha < alpha < above.alpha:
            alpha = (below.alpha + above.alpha) / 2
        tried.append(Tried(alpha, measure(alpha)))
        power = _power(last, tried[-1])
        below, above = (tried[-1], above) if tried[-1].nats <= aim else (below, tried[-1])
    return tried if tried[-1].nats <= budget else [*tried, below]


def _is_close(nats: float, aim: float) -> bool:
    return nats > 0 and abs(math.log(nats / aim)) <= CLOSE


def _power(one: Tried, other: Tried) -> float:
    """Return by which power of alpha the divergence grows between two weights."""
    if min(one.nats, other.nats) <= 0:  # of a model that rounding made the base again
        return POWER
    power = math.log(one.nats / other.nats) / math.log(one.alpha / other.alpha)
    return power if 0.5 < power < 8 else POWER


def keep_budget(
    base: Artifact, tuned: Artifact, control: Artifact, spec: MergeSpec, draft: Draft, machine: Machine
) -> None:
    """Write as metadata the largest alpha up to the spec's whose divergence along `control` is within its budget.

    `control` was sampled by the base, and is neither trained on nor judged by: the verdict is the probe's.
    """
    assert spec.budget
    rows = [row["token_ids"] for row in read_rows(draft.store.path(control), "corpus", ["token_ids"])]
    draft.journal.cut_back(-1)  # what an attempt tried that was cut short is tried again
    between = Between(base, tuned, rows, draft, machine)
    tried = largest_alpha(between.divergence, spec.alpha, spec.budget)
    last = tried[-1]
    metadata = {"alpha": last.alpha, "control_kl": last.nats, "control_kl_at_most": tried[0].nats, "rows": len(rows)}
    write_json(draft.folder / "alpha.json", metadata)
    draft.metadata |= metadata


class Between:
    """A model anywhere between base and tuned, in the numbers in which it would be saved and measured."""

    def __init__(self, base: Artifact, tuned: Artifact, rows: list[list[int]], draft: Draft, machine: Machine) -> None:
        """Load both ends, and the base and one model more on the device."""
        machine.settle()
        release_models()
        folders = [draft.store.path(model) for model in (base, tuned)]
        self.ends = [dict(load_model(folder, "cpu", "float32").named_parameters()) for folder in folders]
        device = machine.resolved_device()
        self.base, self.merged = (load_model(folder, device).eval().requires_grad_(False) for folder in folders)
        self.saved_as = getattr(torch, stored_precision(folders[0]))
        self.rows, self.max_tokens, self.journal = rows, machine.micro_batch_tokens, draft.journal
        self.tries = 0

    def divergence(self, alpha: float) -> float:
        """Return the divergence from the base with the tuned model's weight `alpha`, in nats per token."""

        def progress(done: int) -> None:
            self.journal.progress(done, len(self.rows), f"rows at alpha {alpha:.2f}")

        with torch.no_grad():
            for name, parameter in self.merged.named_parameters():
                start, end = (end[name] for end in self.ends)
                parameter.copy_(interpolated(start, end, alpha).to(self.saved_as))
        parts = divergences(self.base, self.merged, self.rows, self.max_tokens, progress)
        nats = sum(part.kl for part in parts) / sum(part.num_tokens for part in parts)
        if not math.isfinite(nats):
            raise NotFinite(f"the divergence from the base is {nats} at alpha {alpha:g}; lower train.learning_rate")
        self.journal.metrics(self.tries, {"budget/alpha": alpha, "budget/control_kl": nats})
        self.tries += 1
        return nats
