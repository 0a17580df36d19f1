"""Lambda follows the divergence it is told, finds the budget in a world where more lambda means less, and resumes."""

import json
import math
import random
from itertools import pairwise

import pytest
from pydantic import ValidationError

from cfsd.budget import STEERED_TO
from cfsd.train.controller import HIGHEST, LOWEST, Controller
from cfsd.train.spec import RehearsalSpec

BUDGET = 0.02
SPEC = RehearsalSpec(budget=BUDGET)


def test_without_a_budget_lambda_stays_and_nothing_that_is_learned_moves_it() -> None:
    controller = Controller(RehearsalSpec(weight=3.0), 10)
    controller.learn(100.0, 10)
    assert [controller.weight(step) for step in (0, 9)] == pytest.approx([3.0, 3.0])
    assert controller.estimate == pytest.approx(10.0)
    assert Controller(RehearsalSpec(weight=0.0), 10).weight(5) == 0


def test_a_schedule_goes_evenly_in_the_logarithm() -> None:
    controller = Controller(RehearsalSpec(weight=4.0, final_weight=0.25), 5)
    assert [controller.weight(step) for step in range(5)] == pytest.approx([4.0, 2.0, 1.0, 0.5, 0.25])
    assert Controller(RehearsalSpec(weight=4.0, final_weight=0.25), 1).weight(0) == pytest.approx(4.0)


@pytest.mark.parametrize("quotient", [0.5, 1.3])
def test_while_the_surprise_stays_lambda_moves_by_rate_times_it(quotient: float) -> None:
    controller, path = Controller(SPEC.model_copy(update={"budget_rate": 0.5}), 10), []
    for step in range(5):
        controller.learn(quotient * STEERED_TO * BUDGET * 40, 40)
        path.append(math.log(controller.weight(step)))
    assert [after - before for before, after in pairwise(path)] == pytest.approx([0.5 * math.log(quotient)] * 4)
    assert (path[0] > 0) == (quotient > 1)
    assert controller.estimate == pytest.approx(quotient * STEERED_TO * BUDGET)


def test_the_estimate_weighs_tokens_and_forgets() -> None:
    controller = Controller(SPEC, 100)
    controller.learn(1.0, 10)
    controller.learn(0.0, 30)
    weighed = controller.estimate
    assert weighed is not None and 0 < weighed < 0.05  # the mean of two steps' means would be 0.05
    for _ in range(40):
        controller.learn(3.0, 10)
    assert controller.estimate == pytest.approx(0.3, rel=1e-3)


def test_a_step_without_fresh_rows_changes_nothing() -> None:
    controller = Controller(SPEC, 10)
    controller.learn(0.0, 0)
    assert controller.estimate is None and controller.weight(1) == pytest.approx(1.0)
    controller.learn(1.0, 10)
    before = controller.state()
    controller.learn(0.0, 0)
    assert controller.state() == before


def test_a_wild_step_throws_lambda_no_further_than_a_bad_one() -> None:
    weights = []
    for nats in (10 * BUDGET, 1e6):
        controller = Controller(SPEC, 10)
        controller.learn(nats * 10, 10)
        weights.append(controller.weight(1))
    assert weights[0] == weights[1] < HIGHEST / 4


def test_lambda_stays_within_its_bounds() -> None:
    for nats, bound in ((1e3, HIGHEST), (0.0, LOWEST)):
        controller = Controller(SPEC, 10)
        for _ in range(200):
            controller.learn(nats, 10)
        assert controller.weight(1) == pytest.approx(bound)


@pytest.mark.parametrize("start", [0.1, 1.0, 50.0])
@pytest.mark.parametrize("budget", [0.01, 0.1])
def test_it_finds_the_budget_where_more_lambda_means_less_divergence(start: float, budget: float) -> None:
    """A slow plant with noise: the divergence follows 0.3 / (1 + lambda)^2 a fifth of the way per step."""
    rng = random.Random(0)
    controller = Controller(RehearsalSpec(weight=start, budget=budget), 300)
    truth, late = 0.0, []
    for step in range(300):
        truth += 0.2 * (0.3 / (1 + controller.weight(step)) ** 2 - truth)
        controller.learn(truth * rng.uniform(0.6, 1.4) * 100, 100)
        late.append(truth)
    mean = sum(late[150:]) / 150
    assert 0.95 * STEERED_TO * budget < mean < 1.05 * STEERED_TO * budget


def test_it_goes_on_from_its_state_through_json() -> None:
    rng = random.Random(0)
    whole, first = Controller(SPEC, 40), Controller(SPEC, 40)
    steps = [(rng.uniform(0, 0.1) * 30, 30) for _ in range(40)]
    for nats, tokens in steps[:17]:
        first.learn(nats, tokens)
    second = Controller(SPEC, 40)
    second.restore(json.loads(json.dumps(first.state())))
    for nats, tokens in steps[17:]:
        second.learn(nats, tokens)
    for nats, tokens in steps:
        whole.learn(nats, tokens)
    assert second.state() == whole.state()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"weight": 0, "final_weight": 1}, r"set rehearsal\.weight"),
        ({"weight": 0, "budget": 0.1}, r"rehearsal\.weight above 0"),
        ({"budget": 0.1, "final_weight": 1}, "set one of them"),
        ({"budget": 0.1, "refresh": "once"}, "leave refresh at cycle"),
        ({"budget": 0}, "greater than 0"),
        ({"weight": -1}, "greater than or equal to 0"),
        ({"reference": "base"}, "reference has no effect without loss: kl"),
        ({"tail": "bucket"}, "tail has no effect without loss: kl"),
        ({"budget_rate": 0.5}, "budget_rate has no effect without budget"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(given: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        RehearsalSpec.model_validate(given)


def test_what_a_variant_inherits_without_effect_leaves_its_training_the_same() -> None:
    inherited = RehearsalSpec(loss="nll", reference="base", tail="bucket", budget=None, budget_rate=0.5)
    assert inherited.digest() == RehearsalSpec().digest()
    live = RehearsalSpec(loss="kl", reference="base", tail="bucket")
    assert live.digest() == RehearsalSpec(loss="kl", reference="base").digest() != RehearsalSpec(loss="kl").digest()
