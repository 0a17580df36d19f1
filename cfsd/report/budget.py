"""A budget of divergence: was it kept, was it used up, and what did it cost on the target?

Source: CFSD's own rule: kept is a divergence of at most 1.1 x the budget, used up ("tight") of at least 0.8 x; with the
weight of rehearsal at its floor the budget did not bind. The probe alone judges, each mode by its whole interval;
training never saw it. How often each claim is wrong: docs/how-to/budget.md.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from cfsd.budget import KEPT_UP_TO, USED_UP_FROM
from cfsd.generate.spec import UNPROMPTED
from cfsd.recipe import Recipe
from cfsd.report.recipe_text import flattened
from cfsd.report.run_record import RunRecord
from cfsd.report.scores import response_pair, target_gain
from cfsd.report.summary import Fig
from cfsd.store.artifact import Store
from cfsd.train.controller import LOWEST

Outcome = Literal["kept", "exceeded", "cannot tell"]

NEAR = 1.001  # the controller works in logarithms


def budget_of(
    store: Store, run_record: RunRecord, run_records: Sequence[RunRecord], measured: Mapping[str, Fig | None]
) -> dict[str, Any] | None:
    """Return the budget of `run_record` and what became of it, or None if it had none; fields in docs/summary.md.

    `measured`: the divergence in each mode. Of several modes with a budget, the fields are those of the one that
    decides the `outcome`: all are kept, or one is exceeded, or of one it cannot be told. The cost is counted against
    the plain fine-tuning variant in `run_records` that differs least from this one.
    """
    budgets = run_record.budgets()
    if not budgets:
        return None
    training: Any = run_record.artifacts["tuned"].metadata
    weight = training.get("final_weight")  # None: lambda was not steered, merging alone keeps the budget
    plain = plain_variant(run_record, run_records)
    cost = _cost(store, run_record, plain) if plain else None
    merged: Any = run_record.artifacts["fitted"].metadata if "fitted" in run_record.artifacts else {}
    before = merged.get("control_kls_at_most") or {UNPROMPTED: merged.get("control_kl_at_most")}
    modes = {
        mode: {"nats": nats, **judge(measured.get(mode), nats, weight)}
        | {"ratio_before_merging": None if before.get(mode) is None else before[mode] / nats}
        for mode, nats in budgets.items()
    }
    return {
        **modes[max(modes, key=lambda mode: severity(modes[mode]))],
        **({} if set(modes) == {UNPROMPTED} else {"modes": modes}),
        "final_weight": weight,
        "divergence_estimate": training.get("divergence_estimate"),
        "alpha": merged.get("alpha"),
        "plain": plain.name if plain and cost else None,
        "target_gain_cost": cost,
    }


def severity(judged: dict[str, Any]) -> tuple[int, float]:
    """Order modes by what the outcome of all is: exceeded before what cannot be told before kept, then by the ratio."""
    order: tuple[Outcome, ...] = ("kept", "cannot tell", "exceeded")
    return order.index(judged["outcome"]), judged["ratio"]["value"] if judged["ratio"] else 0.0


def judge(divergence: Fig | None, budget: float, weight: float | None) -> dict[str, Any]:
    """Return `outcome`, `tight` (None where the interval leaves that open), `binding`, `ratio` to the budget, `needs`.

    The whole interval decides: where it holds a limit, that limit is not judged. `needs` is how many times as many
    rows of the probe would decide the outcome if the value stayed; None where it is decided or no interval is known.
    """
    ratio = _ratio(divergence, budget)
    outcomes: dict[bool | None, Outcome] = {False: "kept", True: "exceeded", None: "cannot tell"}
    return {
        "outcome": outcomes[_is_above(ratio, KEPT_UP_TO)],
        "tight": _is_above(ratio, USED_UP_FROM),
        "binding": weight is None or weight > LOWEST * NEAR,
        "ratio": ratio,
        "needs": _times_as_many(ratio, KEPT_UP_TO),
    }


def _ratio(probe_kl: Fig | None, budget: float) -> Fig | None:
    if probe_kl is None:
        return None
    ends = {end: None if probe_kl[end] is None else probe_kl[end] / budget for end in ("value", "low", "high")}
    return ends | {"unit": "of the budget"}


def _is_above(ratio: Fig | None, limit: float) -> bool | None:
    """Return whether the whole interval is above `limit`, or none of it is; None where it holds the limit."""
    if ratio is None or ratio["low"] is None or ratio["low"] <= limit < ratio["high"]:
        return None
    return bool(ratio["low"] > limit)


def _times_as_many(ratio: Fig | None, limit: float) -> float | None:
    """Return by how much the sample must grow for the interval, which narrows as 1/sqrt(rows), to leave the limit."""
    if ratio is None or ratio["low"] is None or _is_above(ratio, limit) is not None:
        return None
    value = float(ratio["value"])
    side = float(ratio["high"]) - value if value <= limit else value - float(ratio["low"])
    return (side / max(abs(limit - value), 1e-3)) ** 2


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
