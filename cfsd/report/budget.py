"""A budget of divergence: was it met, was it used up, and what did it cost on the target?

Source: CFSD's own rule: the final probe_kl is at most 1.1 x the budget ("met") and at least 0.8 x ("tight"); with the
weight of rehearsal at its floor the budget did not bind. The probe alone judges; training never saw it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from cfsd.budget import KEPT_UP_TO, USED_UP_FROM
from cfsd.report.run_record import RunRecord
from cfsd.report.scores import table
from cfsd.report.summary import Summary
from cfsd.report.table import POINTS, Fig, number, shown, sign_of, variant_of
from cfsd.report.training import budget_setting, metrics_of, nested, rehearsal_of
from cfsd.statistics.figures import difference_per_token
from cfsd.store.artifact import Store
from cfsd.train.controller import HIGHEST, LOWEST
from cfsd.train.methods import Methods

WIDEST = 0.1  # half-width of the probe's interval, as a share of the value, up to which the value alone may judge
NEAR = 1.001  # the controller works in logarithms
OUTCOMES = {
    "tight": "kept its budget {nats} and used it up",
    "met": "kept its budget {nats}",
    "not binding": "would have kept its budget {nats} with hardly any rehearsal",
    "missed": "missed its budget {nats}",
    "unknown": "may or may not have kept its budget {nats}",
}


def budget_of(
    store: Store, run_record: RunRecord, run_records: Sequence[RunRecord], summary: Summary
) -> dict[str, Any] | None:
    """Return the budget of `run_record` and what became of it, or None if it had none; fields in docs/summary.md.

    The cost is counted against the plain fine-tuning variant in `run_records` that differs least from this one.
    """
    budget = budget_setting(run_record)
    if budget is None:
        return None
    weight, plain = _final_weight(store, run_record), plain_variant(run_record, run_records)
    judged = judge(summary.probe_kl, budget, weight)
    cost = _cost(store, run_record, plain) if plain else None
    estimate = run_record.artifacts["tuned"].metadata.get("divergence_estimate")
    return {
        "nats": budget,
        **judged,
        "final_weight": weight,
        "divergence_estimate": estimate,
        **_merged(run_record, budget),
        "plain": plain.name if plain and cost else None,
        "target_gain_cost": cost,
    }


def _merged(run_record: RunRecord, budget: float) -> dict[str, Any]:
    """Return the weight that the tuned model was merged with, and where it stood without that, by a control sample."""
    metadata: Any = run_record.artifacts["fitted"].metadata if "fitted" in run_record.artifacts else {}
    before = metadata.get("control_kl_at_most")
    return {"alpha": metadata.get("alpha"), "ratio_before_merging": None if before is None else before / budget}


def judge(probe_kl: Fig | None, budget: float, weight: float | None) -> dict[str, Any]:
    """Return `outcome`, `met`, `tight` (None where that cannot be told), `ratio` to the budget, `half_width`.

    An interval wider than WIDEST judges only where it lies wholly on one side of a limit.
    """
    floor = weight is not None and weight <= LOWEST * NEAR
    ratio = probe_kl and {
        k: None if probe_kl[k] is None else probe_kl[k] / budget for k in ("value", "low", "high")
    } | {"unit": "of the budget"}  # fmt: skip
    half_width = _half_width(probe_kl)
    met, above = (_at_most(ratio, limit, half_width) for limit in (KEPT_UP_TO, USED_UP_FROM))
    tight = None if met is None or above is None else met and not above
    tight = False if met is False or above is True else tight
    if met is False:
        outcome = "missed"
    elif floor:
        outcome = "not binding"
    elif met is None:
        outcome = "unknown"
    else:
        outcome = "tight" if tight else "met"
    return {
        "outcome": outcome, "met": met, "tight": tight, "binding": not floor, "ratio": ratio, "half_width": half_width,
    }  # fmt: skip


def _half_width(figure: Fig | None) -> float | None:
    """Return half of the interval as a share of the value; None where either is not known."""
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


def _final_weight(store: Store, run_record: RunRecord) -> float | None:
    tuned = run_record.artifacts["tuned"]
    if (known := tuned.metadata.get("final_weight")) is not None:
        return float(known)  # type: ignore[arg-type]
    weights = metrics_of(store, tuned).get("train/rehearsal_weight")
    return list(weights.values())[-1] if weights else None


def plain_variant(run_record: RunRecord, run_records: Sequence[RunRecord]) -> RunRecord | None:
    """Return the variant that fine-tunes `run_record`'s base on its target with nothing against forgetting.

    Of several, the one whose recipe differs in the fewest settings: the same seed comes before another one.
    """
    alike = [t for t in run_records if is_plain(t) and _same_question(t, run_record)]
    return min(alike, key=lambda other: _differences(other.recipe, run_record.recipe), default=None)


def is_plain(run_record: RunRecord) -> bool:
    """Say whether `run_record` was trained without rehearsal and without any method, and not merged."""
    tuned, recipe = run_record.artifacts.get("tuned"), run_record.recipe
    if tuned is None or not recipe:
        return False
    corpus = run_record.artifacts.get("selected_corpus") or run_record.artifacts.get("filtered")
    rehearsed = tuned.metadata.get("rehearsal_tokens", corpus.metadata.get("rows") if corpus else 0)
    if rehearsed and rehearsal_of(run_record).get("weight", 1.0) != 0:
        return False
    if Methods.model_validate(nested(recipe, "train", "methods")).by_name():
        return False
    merging = nested(recipe, "merge")
    merged = merging.get("alpha", 1) not in (1, None) or merging.get("budget")
    return not merged and nested(recipe, "mix").get("flow", "off") in ("off", None)


def _same_question(one: RunRecord, other: RunRecord) -> bool:
    roles = [role for role in ("base", "target", "selected_target") if role in one.artifacts or role in other.artifacts]
    same = all(one.artifacts.get(role) == other.artifacts.get(role) for role in roles)
    return same and one.after.target is not None and other.after.target is not None


def _differences(one: Any, other: Any) -> int:
    if isinstance(one, dict) and isinstance(other, dict):
        return sum(_differences(one.get(name), other.get(name)) for name in one | other)
    return int(one != other)


def _cost(store: Store, run_record: RunRecord, plain: RunRecord) -> Fig | None:
    """Return by how much the plain variant's held-out loss is lower, paired by row; positive = gain given up."""
    assert run_record.after.target and plain.after.target
    own, other = (table(store, t.after.target, "responses") for t in (run_record, plain) if t.after.target)
    columns = ["row_id", "count"]
    if not own[columns].equals(other[columns]):
        return None  # they were not asked the same rows
    cost = difference_per_token(own["nll"].to_numpy(), other["nll"].to_numpy(), own["count"].to_numpy(float), seed=0)
    return cost.model_dump()


def budget_sentences(summaries: Sequence[Summary]) -> list[str]:
    """Return a sentence per variant that had a budget; the repeats of a variant are counted."""
    variants: dict[str, list[Summary]] = {}
    for summary in summaries:
        if summary.budget:
            variants.setdefault(variant_of(summary.name), []).append(summary)
    return [" ".join(_sentence(name, repeats)) for name, repeats in variants.items()]


def _sentence(name: str, repeats: list[Summary]) -> Iterator[str]:
    budgets = [s.budget for s in repeats if s.budget]
    nats = f"of {number(budgets[0]['nats'])} nats per token"
    if len(budgets) > 1:
        counts = {o: [b["outcome"] for b in budgets].count(o) for o in OUTCOMES}
        found = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
        yield f"Budget {nats} of “{name}”, over {len(budgets)} seeds: {found}."
        return
    (budget,) = budgets
    used = budget["ratio"] and f"probe_kl is {shown(budget['ratio'], POINTS)} % of it"
    ratio = used or "the probe was not measured"
    yield f"“{name}” {OUTCOMES[budget['outcome']].format(nats=nats)}: {ratio}{_weight(budget)}."
    if (before := budget.get("ratio_before_merging") or 0) > 1:
        alpha = number(budget["alpha"])
        yield f"Before merging it stood at {number(before * POINTS)} % of it; the base was mixed in (alpha {alpha})."
    if budget["outcome"] == "unknown" and budget["ratio"]:
        yield (
            f"The probe's interval is too wide to tell ({_width(budget)}; {WIDEST * 100:.0f} % is enough): "
            "raise probe.rows."
        )
    if budget["target_gain_cost"]:
        yield _cost_in_words(budget)


def _weight(budget: dict[str, Any]) -> str:
    weight = budget["final_weight"]
    if weight is None:
        return ""
    if not budget["binding"]:
        return f", with λ at its floor of {LOWEST:g}"
    return f", with λ at its ceiling of {HIGHEST:g}" if weight >= HIGHEST / NEAR else f", with λ at {number(weight)}"


def _width(budget: dict[str, Any]) -> str:
    half = budget["half_width"]
    return "no interval is known" if half is None else f"half of it is {number(half * POINTS)} % of the value"


def _cost_in_words(budget: dict[str, Any]) -> str:
    cost, plain = budget["target_gain_cost"], f"“{budget['plain']}”"
    if sign_of(cost) == 0:
        return f"It was not found to cost target gain against {plain}: {shown(cost)} nats per token."
    if sign_of(cost) < 0:
        return f"It learned more of the target than {plain}, by {shown(_turned(cost))} nats per token."
    return f"That gave up {shown(cost)} nats per token of the target gain of {plain}."


def _turned(figure: Fig) -> Fig:
    return {"value": -figure["value"], "low": -figure["high"], "high": -figure["low"]}
