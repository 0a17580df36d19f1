"""Alpha is brought down just as far as a budget of divergence demands: on planted curves, and on real models."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cfsd.budget import MERGED_TO
from cfsd.errors import BadInput
from cfsd.machine import Machine
from cfsd.merge.budget import CLOSE, MAX_TRIES, largest_alpha
from cfsd.overrides import override, validated
from cfsd.recipe import Recipe
from cfsd.report.run_record import RunRecord
from cfsd.report.summarise import summarise
from cfsd.store.artifact import Store

CPU = Machine(device="cpu", threads=1)
BUDGET = 0.1
Curve = Callable[[float], float]


def steep(alpha: float) -> float:
    """A model that breaks between two ends, as those do that have left the base's valley."""
    return 2 * alpha**2 if alpha < 0.3 else 5 - 4 * alpha


CURVES: dict[str, Curve] = {
    "quadratic": lambda a: 0.7 * a**2,
    "flatter": lambda a: 0.7 * a**1.3,
    "steeper": lambda a: 40 * a**4,
    "bent": lambda a: 3 * a**2 / (1 + 5 * a),
    "far": lambda a: 500 * a**2,
    "breaks between": steep,
}


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("most", [1.0, 0.6])
def test_the_budget_is_kept_and_used_up_whatever_the_curve(name: str, most: float) -> None:
    tried = largest_alpha(CURVES[name], most, BUDGET)
    assert tried[0].alpha == most
    assert abs(math.log(tried[-1].nats / (MERGED_TO * BUDGET))) <= CLOSE
    assert all(found.nats == CURVES[name](found.alpha) for found in tried)
    assert len(tried) <= (4 if name != "breaks between" else MAX_TRIES)


def test_what_keeps_the_budget_stays_as_it_was_trained() -> None:
    assert largest_alpha(lambda a: 0.99 * BUDGET * a**2, 1.0, BUDGET) == [(1.0, 0.99 * BUDGET)]


def test_where_nothing_comes_close_the_best_below_is_taken() -> None:
    """A curve with a jump across the budget: no weight uses it up."""
    tried = largest_alpha(lambda a: 0.04 * a if a < 0.4 else 1 + a, 1.0, BUDGET)
    assert len(tried) >= MAX_TRIES and 0.39 < tried[-1].alpha < 0.4


def test_a_divergence_of_nothing_is_no_end_to_the_search() -> None:
    """Weights in few bits: below some alpha the merged model is the base."""
    tried = largest_alpha(lambda a: 0.0 if a < 0.3 else 2 * a, 1.0, BUDGET)
    assert 0.29 < tried[-1].alpha < 0.3 and tried[-1].nats == 0


# --- real models ---------------------------------------------------------------------------------------------------


@pytest.fixture
def content(recipe_file: Path) -> dict[str, Any]:
    return Recipe.load(recipe_file).model_dump(mode="json")


def taken(content: dict[str, Any], **changes: Any) -> RunRecord:
    from flows.mitigate import mitigate

    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    return mitigate(validated(Recipe, override(content, dotted), "test"), CPU).only()


def kl_of(run_record: RunRecord) -> float:
    assert run_record.after.probe
    return float(str(run_record.after.probe.metadata["probe_kl"]))


def test_any_training_keeps_a_budget(content: dict[str, Any], home: Path, server: str) -> None:
    """Plain fine-tuning, with a learning rate that is far too high."""
    wild = {"generate__rows": 0, "train__learning_rate": 3e-3, "probe__rows": 128}
    plain = taken(content, **wild)
    budget = kl_of(plain) / 5
    kept = taken(content, **wild, merge__budget=budget)
    executed = [step.stage for step in kept.steps if step.executed]
    assert executed[:3] == ["probe", "budget", "merge"] and "train" not in executed
    assert 0.7 * budget < kl_of(kept) < 1.1 * budget  # control and probe are two samples
    found = summarise(Store(home), kept, [plain, kept])
    assert found.budget and 0 < found.budget["alpha"] < 1
    assert found.budget["ratio_before_merging"] == pytest.approx(5, rel=0.2)
    assert found.budget["plain"] == plain.name  # a merged model is no plain one
    assert kept.artifacts["control"].content != kept.artifacts["probe"].content
    again = taken(content, **wild, merge__budget=budget)
    assert not any(step.executed for step in again.steps)


def test_a_budget_that_is_not_reached_changes_no_weight(content: dict[str, Any], home: Path, server: str) -> None:
    plain = taken(content, generate__rows=0)
    kept = taken(content, generate__rows=0, merge__budget=2 * kl_of(plain) + 1)
    assert kept.artifacts["final"] == plain.artifacts["final"] == kept.artifacts["tuned"]
    assert kept.artifacts["fitted"].metadata["alpha"] == 1


def test_merging_no_further_than_asked_for(content: dict[str, Any], home: Path, server: str) -> None:
    half = taken(content, generate__rows=0, merge__alpha=0.5)
    both = taken(content, generate__rows=0, merge__alpha=0.5, merge__budget=10.0)
    assert both.artifacts["final"].content == half.artifacts["final"].content


def test_no_budget_is_no_sample_and_no_measurement(content: dict[str, Any], home: Path, server: str) -> None:
    assert not {"control", "fitted"} & set(taken(content).artifacts)


def test_the_plan_knows_that_alpha_is_found_after_training(content: dict[str, Any], home: Path) -> None:
    from flows._plan import walk
    from flows.mitigate import pipeline

    steps = walk(validated(Recipe, override(content, {"merge.budget": 0.01}), "test"), CPU, pipeline).steps
    stages = [step.stage for step in steps]
    assert stages.count("probe") == 2
    assert stages.index("train") < stages.index("budget") < stages.index("merge")


@pytest.mark.parametrize("budget", [0, -1])
def test_a_budget_must_be_positive(content: dict[str, Any], budget: float) -> None:
    with pytest.raises(BadInput, match=r"merge\.budget: .*greater than 0"):
        validated(Recipe, override(content, {"merge.budget": budget}), "test")
