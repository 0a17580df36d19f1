"""A budget of divergence: was it met, was it used up, and what did it cost on the target?

Source: CFSD's own rule: the final probe_kl is at most 1.1 x the budget ("met") and at least 0.8 x ("tight"); with the
weight of rehearsal at its floor the budget did not bind. The probe alone judges; training never saw it.
"""

from collections.abc import Sequence
from typing import Any

from cfsd.budget import KEPT_UP_TO, USED_UP_FROM
from cfsd.recipe import Recipe
from cfsd.report.recipe_text import flattened
from cfsd.report.run_record import RunRecord
from cfsd.report.scores import response_pair, target_gain
from cfsd.report.summary import Fig
from cfsd.report.training import last_weight
from cfsd.store.artifact import Store
from cfsd.train.controller import LOWEST

WIDEST = 0.1  # half-width of the probe's interval, as a share of the value, up to which the value alone may judge
NEAR = 1.001  # the controller works in logarithms


def budget_of(
    store: Store, run_record: RunRecord, run_records: Sequence[RunRecord], probe_kl: Fig | None
) -> dict[str, Any] | None:
    """Return the budget of `run_record` and what became of it, or None if it had none; fields in docs/summary.md.

    The cost is counted against the plain fine-tuning variant in `run_records` that differs least from this one.
    """
    budget = run_record.budget()
    if budget is None:
        return None
    training: Any = run_record.artifacts["tuned"].metadata
    weight = training.get("final_weight") or last_weight(store, run_record)
    plain = plain_variant(run_record, run_records)
    cost = _cost(store, run_record, plain) if plain else None
    merged: Any = run_record.artifacts["fitted"].metadata if "fitted" in run_record.artifacts else {}
    before = merged.get("control_kl_at_most")
    return {
        "nats": budget,
        **judge(probe_kl, budget, weight),
        "final_weight": weight,
        "divergence_estimate": training.get("divergence_estimate"),
        "alpha": merged.get("alpha"),
        "ratio_before_merging": None if before is None else before / budget,
        "plain": plain.name if plain and cost else None,
        "target_gain_cost": cost,
    }


def judge(probe_kl: Fig | None, budget: float, weight: float | None) -> dict[str, Any]:
    """Return `outcome`, `met`, `tight` (None where the interval leaves that open), `ratio` to the budget, `half_width`.

    An interval wider than WIDEST judges only where it lies wholly on one side of a limit.
    """
    floor = weight is not None and weight <= LOWEST * NEAR
    ratio, half_width = _ratio(probe_kl, budget), _half_width(probe_kl)
    met, below = (_at_most(ratio, limit, half_width) for limit in (KEPT_UP_TO, USED_UP_FROM))
    missed = met is False
    tight = False if missed or below else None if met is None or below is None else True
    outcomes = {"missed": missed, "not binding": floor, "unknown": met is None, "tight": tight, "met": True}
    return {
        "outcome": next(outcome for outcome, holds in outcomes.items() if holds),
        "met": met,
        "tight": tight,
        "binding": not floor,
        "ratio": ratio,
        "half_width": half_width,
    }


def _ratio(probe_kl: Fig | None, budget: float) -> Fig | None:
    if probe_kl is None:
        return None
    ends = {end: None if probe_kl[end] is None else probe_kl[end] / budget for end in ("value", "low", "high")}
    return ends | {"unit": "of the budget"}


def _half_width(figure: Fig | None) -> float | None:
    if figure is None or figure["low"] is None or figure["value"] <= 0:
        return None
    return float(figure["high"] - figure["low"]) / 2 / float(figure["value"])


def _at_most(ratio: Fig | None, limit: float, half_width: float | None) -> bool | None:
    if ratio is None:
        return None
    if half_width is not None and half_width <= WIDEST:
        return bool(ratio["value"] <= limit)
    if ratio["low"] is None or ratio["low"] <= limit < ratio["high"]:
        return None
    return bool(ratio["high"] <= limit)


def plain_variant(run_record: RunRecord, run_records: Sequence[RunRecord]) -> RunRecord | None:
    """Return the variant that fine-tunes `run_record`'s base on its target with nothing against forgetting.

    Of several, the one whose recipe differs in the fewest settings: the same seed comes before another one.
    """
    settings = _settings(run_record.recipe)

    def differences(other: RunRecord) -> int:
        others = _settings(other.recipe)
        return sum(settings.get(name) != others.get(name) for name in settings | others)

    def question(one: RunRecord) -> list[Any]:
        return [one.artifacts.get(role) for role in ("base", "target", "selected_target")]

    plain = [r for r in run_records if r.recipe and r.recipe.is_plain() and question(r) == question(run_record)]
    return min(plain, key=differences, default=None)


def _settings(recipe: Recipe | None) -> dict[str, Any]:
    return dict(flattened(recipe.model_dump())) if recipe else {}


def _cost(store: Store, run_record: RunRecord, plain: RunRecord) -> Fig | None:
    """Return by how much the plain variant's held-out loss is lower, paired by row; positive = gain given up."""
    if run_record.after.target is None or plain.after.target is None:
        return None
    own, other = response_pair(store, run_record.after.target, plain.after.target)
    same = ["row_id", "count"]
    return target_gain(own, other).model_dump() if own[same].equals(other[same]) else None
