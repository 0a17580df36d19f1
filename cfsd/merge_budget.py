"""The weight of the tuned model with which the merged one keeps a budget of divergence."""

import math
from collections.abc import Callable
from typing import NamedTuple

from cfsd.artifact import Artifact, Draft
from cfsd.content import write_json
from cfsd.errors import NotFinite
from cfsd.machine import Machine
from cfsd.merge import MergeSpec, interpolated

AIM = 0.95  # of the budget: the middle between 0.8, from where on it counts as used up, and 1.1, where it is exceeded
CLOSE = 0.03  # of the aim: finer than a control sample can tell
MOST_TRIES = 10
POWER = 1.5  # of alpha in the divergence, to begin with: near the tuned model 1.0 to 1.7 was measured, near the base 2


class Tried(NamedTuple):
    """A merged model: the tuned model's weight in it, and its divergence from the base in nats per token."""

    alpha: float
    nats: float


def largest_alpha(measure: Callable[[float], float], most: float, budget: float) -> list[Tried]:
    """Return the weights tried, in order; the last one keeps `budget` as `measure` sees it, and is to be taken.

    `most` is taken if it keeps the budget; else the divergence is brought within CLOSE of AIM x budget.
    """
    tried = [Tried(most, measure(most))]
    if tried[0].nats <= budget:
        return tried
    below, above, power = Tried(0.0, 0.0), tried[0], POWER
    while abs(math.log(tried[-1].nats / (AIM * budget))) > CLOSE and len(tried) < MOST_TRIES:
        last = tried[-1]
        alpha = last.alpha * (AIM * budget / last.nats) ** (1 / power)
        if not below.alpha < alpha < above.alpha:
            alpha = (below.alpha + above.alpha) / 2
        tried.append(Tried(alpha, measure(alpha)))
        power = _power(last, tried[-1])
        below, above = (tried[-1], above) if tried[-1].nats <= AIM * budget else (below, tried[-1])
    return tried if tried[-1].nats <= budget else [*tried, below]


def _power(one: Tried, other: Tried) -> float:
    """Return by which power of alpha the divergence grows between two weights."""
    found = math.log(one.nats / other.nats) / math.log(one.alpha / other.alpha)
    return found if 0.5 < found < 8 else POWER


def keep_budget(
    base: Artifact, tuned: Artifact, control: Artifact, spec: MergeSpec, draft: Draft, machine: Machine
) -> None:
    """Write as facts the largest alpha up to the spec's whose divergence along `control` is within its budget.

    `control` was sampled by the base, and is neither trained on nor judged by: the verdict is the probe's.
    """
    import torch

    from cfsd.checkpoint import load_model, release_models, stored_precision
    from cfsd.divergence import divergences
    from cfsd.rows import read_rows

    machine.settle()
    release_models()
    device, store = machine.resolved_device(), draft.store
    folders = [store.path(model) for model in (base, tuned)]
    ends = [dict(load_model(folder, "cpu", "float32").named_parameters()) for folder in folders]
    before, merged = (load_model(folder, device).eval().requires_grad_(False) for folder in folders)
    rows = [row["token_ids"] for row in read_rows(store.path(control), "corpus", ["token_ids"])]
    written = getattr(torch, stored_precision(folders[0]))
    tries = 0

    def measure(alpha: float) -> float:
        nonlocal tries

        def progress(done: int) -> None:
            draft.journal.progress(done, len(rows), f"rows at alpha {alpha:.2f}")

        for name, parameter in merged.named_parameters():
            parameter.copy_(interpolated(ends[0][name], ends[1][name], alpha).to(written))  # as it is going to be saved
        found = divergences(before, merged, rows, machine.micro_batch_tokens, progress)
        nats = sum(part.kl for part in found) / sum(part.num_tokens for part in found)
        if not math.isfinite(nats):
            raise NotFinite(f"the divergence from the base is {nats} at alpha {alpha:g}; lower train.learning_rate")
        draft.journal.metrics(tries, {"budget/alpha": alpha, "budget/control_kl": nats})
        tries += 1
        return nats

    assert spec.budget
    with torch.no_grad():
        tried = largest_alpha(measure, spec.alpha, spec.budget)
    found = tried[-1]
    facts = {"alpha": found.alpha, "control_kl": found.nats, "control_kl_at_most": tried[0].nats, "rows": len(rows)}
    write_json(draft.folder / "alpha.json", facts)
    draft.facts |= facts
