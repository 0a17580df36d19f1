"""The weight of the tuned model with which the merged one keeps a budget of divergence."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, count
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cfsd.budget import MERGED_TO
from cfsd.errors import NotFinite
from cfsd.evaluate.divergence import BasePredictions, Counted, counted_rows
from cfsd.generate.spec import UNPROMPTED
from cfsd.machine import Machine
from cfsd.merge.spec import MergeSpec
from cfsd.merge.stage import interpolated
from cfsd.model.folder import stored_formats
from cfsd.model.loading import load_model, release_models
from cfsd.model.rounding import exact_folder
from cfsd.store.artifact import Artifact, Draft
from cfsd.store.digests import write_json
from cfsd.store.journal import Journal

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
    base: Artifact, tuned: Artifact, controls: Sequence[Artifact], spec: MergeSpec, draft: Draft, machine: Machine
) -> None:
    """Write as metadata the largest alpha up to the spec's whose divergence along every control is within its budget.

    The `controls`, in the order of the spec's budgets, were sampled by the base, and are neither trained on nor judged
    by: the verdict is the probe's. Raises NotFinite where a divergence is not finite.
    """
    assert spec.budget
    budgets = spec.budget if isinstance(spec.budget, dict) else {UNPROMPTED: spec.budget}
    rows = {mode: counted_rows(draft.store.path(own)) for mode, own in zip(budgets, controls, strict=True)}
    draft.journal.cut_back(-1)  # what an attempt tried that was cut short is tried again
    machine.settle()
    release_models()
    measure = _divergences_at(draft.store.path(base), draft.store.path(tuned), rows, draft.journal, machine)
    found: dict[float, dict[str, float]] = {0.0: dict.fromkeys(rows, 0.0)}
    unit = next(iter(budgets.values()))

    def worst(alpha: float) -> float:
        """Return the divergence of the mode that uses most of its budget, on the scale of the first one's."""
        found[alpha] = measure(alpha)
        return max(nats * (unit / budgets[mode]) for mode, nats in found[alpha].items())

    tried = largest_alpha(worst, spec.alpha, unit)
    first, last = (found[tried[place].alpha] for place in (0, -1))
    metadata: dict[str, Any] = {
        "alpha": tried[-1].alpha, "control_kl": last.get(UNPROMPTED), "control_kl_at_most": first.get(UNPROMPTED),
        "rows": sum(map(len, rows.values())),
    }  # fmt: skip
    if set(budgets) != {UNPROMPTED}:
        metadata |= {"control_kls": last, "control_kls_at_most": first}
    write_json(draft.folder / "alpha.json", metadata)
    draft.metadata |= metadata


def _divergences_at(
    base: Path, tuned: Path, rows: Mapping[str, list[Counted]], journal: Journal, machine: Machine
) -> Callable[[float], dict[str, float]]:
    """Return the modes' divergences from the base as a function of alpha, in the precision of the saved model."""
    device = machine.resolved_device()
    predictions = _predictions(base, rows, device, machine.micro_batch_tokens)
    exact = (load_model(folder, "cpu", "float32") for folder in (base, exact_folder(tuned)))
    ends = [dict(model.named_parameters()) for model in exact]
    merged = load_model(tuned, device).eval().requires_grad_(False)
    formats, tries = stored_formats(base), count()
    total = sum(map(len, rows.values()))

    def along(mode: str, alpha: float, before: int) -> float:
        def progress(done: int) -> None:
            journal.progress(before + done, total, f"rows at alpha {alpha:.2f}")

        parts = predictions[mode].divergences(merged, progress)
        nats = sum(part.kl for part in parts) / sum(part.num_tokens for part in parts)
        if not math.isfinite(nats):
            raise NotFinite(f"the divergence from the base is {nats} at alpha {alpha:g}; lower train.learning_rate")
        return nats

    def measure(alpha: float) -> dict[str, float]:
        with torch.no_grad():
            for name, parameter in merged.named_parameters():
                parameter.copy_(interpolated(ends[0][name], ends[1][name], alpha).to(getattr(torch, formats.of(name))))
        before = accumulate((len(own) for own in rows.values()), initial=0)
        nats = {mode: along(mode, alpha, done) for mode, done in zip(rows, before, strict=False)}
        named = {f"budget/control_kl{'' if mode == UNPROMPTED else f'/{mode}'}": kl for mode, kl in nats.items()}
        journal.metrics(next(tries), {"budget/alpha": alpha} | named)
        return nats

    return measure


def _predictions(
    base: Path, rows: Mapping[str, list[Counted]], device: str, max_tokens: int
) -> dict[str, BasePredictions]:
    """Return what the base predicts along the rows of each mode: read once, whatever number of weights is tried."""
    model = load_model(base, device).eval().requires_grad_(False)
    predictions = {}
    for mode, own in rows.items():
        token_rows, masks = ([*of] for of in zip(*own, strict=True))
        predictions[mode] = BasePredictions(model, token_rows, max_tokens, masks)
        predictions[mode].keep()
    return predictions
