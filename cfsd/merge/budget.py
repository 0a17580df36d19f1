"""The weight of the tuned model with which the merged one keeps a budget of divergence."""

import math
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch

from cfsd.budget import MERGED_TO
from cfsd.errors import NotFinite
from cfsd.evaluate.divergence import divergences
from cfsd.machine import Machine
from cfsd.merge.spec import MergeSpec
from cfsd.merge.stage import interpolated
from cfsd.model.folder import stored_precision
from cfsd.model.loading import load_model, release_models
from cfsd.model.rounding import exact_folder
from cfsd.store.artifact import Artifact, Draft
from cfsd.store.digests import write_json
from cfsd.store.journal import Journal
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
    Raises NotFinite where the divergence is not finite.
    """
    assert spec.budget
    rows = [row["token_ids"] for row in read_rows(draft.store.path(control), "corpus", ["token_ids"])]
    draft.journal.cut_back(-1)  # what an attempt tried that was cut short is tried again
    machine.settle()
    release_models()
    measure = _divergence_at(draft.store.path(base), draft.store.path(tuned), rows, draft.journal, machine)
    tried = largest_alpha(measure, spec.alpha, spec.budget)
    last = tried[-1]
    metadata = {"alpha": last.alpha, "control_kl": last.nats, "control_kl_at_most": tried[0].nats, "rows": len(rows)}
    write_json(draft.folder / "alpha.json", metadata)
    draft.metadata |= metadata


def _divergence_at(
    base: Path, tuned: Path, rows: list[list[int]], journal: Journal, machine: Machine
) -> Callable[[float], float]:
    """Return the divergence from the base as a function of alpha, in the precision of the saved and measured model."""
    exact = (load_model(folder, "cpu", "float32") for folder in (base, exact_folder(tuned)))
    ends = [dict(model.named_parameters()) for model in exact]
    device = machine.resolved_device()
    base_model, merged = (load_model(folder, device).eval().requires_grad_(False) for folder in (base, tuned))
    saved_as, tries = getattr(torch, stored_precision(base)), count()

    def measure(alpha: float) -> float:
        def progress(done: int) -> None:
            journal.progress(done, len(rows), f"rows at alpha {alpha:.2f}")

        with torch.no_grad():
            for name, parameter in merged.named_parameters():
                parameter.copy_(interpolated(ends[0][name], ends[1][name], alpha).to(saved_as))
        parts = divergences(base_model, merged, rows, machine.micro_batch_tokens, progress)
        nats = sum(part.kl for part in parts) / sum(part.num_tokens for part in parts)
        if not math.isfinite(nats):
            raise NotFinite(f"the divergence from the base is {nats} at alpha {alpha:g}; lower train.learning_rate")
        journal.metrics(next(tries), {"budget/alpha": alpha, "budget/control_kl": nats})
        return nats

    return measure
