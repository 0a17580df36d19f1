"""The gate: how often it fails honest runs, how often it sees a fault, and what it says when it cannot tell."""

import re

import numpy as np
import pytest
from pydantic import ValidationError
from scipy import stats

from cfsd.statistics.gate import Guarded, document_noise, document_variance, holm, judge, margin_of

SPREAD = 0.02


def figure(baseline: object, fresh: object, **changes: object) -> Guarded:
    values = [float(v) for v in np.asarray(baseline)]
    settings = {
        "name": "forgetting/rev", "unit": "fraction", "higher_is_better": False, "baseline": values,
        "fresh": [float(v) for v in np.atleast_1d(np.asarray(fresh, dtype=float))],
        "margin": margin_of(values, least=0.01), "num_documents": 100,
    }  # fmt: skip
    return Guarded(**(settings | changes))


def outcomes(shift: float, *, runs: int, fresh: int = 2, seeds: int = 5, figures: int = 8) -> dict[str, float]:
    """Return how often each outcome comes, one of `figures` being worse by `shift` spreads."""
    rng = np.random.default_rng(0)
    found = {"fail": 0, "pass": 0, "cannot tell": 0}
    for _ in range(runs):
        drawn = rng.normal(0.3, SPREAD, (figures, seeds + fresh))
        drawn[0, seeds:] += shift * SPREAD
        found[judge([figure(row[:seeds], row[seeds:], name=str(i)) for i, row in enumerate(drawn)]).outcome] += 1
    return {name: count / runs for name, count in found.items()}


@pytest.mark.parametrize("fresh", [1, 2])
def test_honest_runs_hardly_ever_fail_and_mostly_pass(fresh: int) -> None:
    found = outcomes(0.0, runs=600, fresh=fresh)
    assert found["fail"] <= 0.02  # 1 % family-wise, and three standard errors of 600 runs
    assert found["pass"] >= {1: 0.65, 2: 0.85}[fresh]


def test_a_fault_is_found_and_more_seeds_find_smaller_ones() -> None:
    assert outcomes(25.0, runs=100)["fail"] >= 0.95
    few, many = (outcomes(7.0, runs=150, seeds=seeds)["fail"] for seeds in (5, 12))
    assert many > few + 0.1


def test_a_worsening_within_the_margin_never_fails_however_significant() -> None:
    found = judge([figure([0.1, 0.1001, 0.0999, 0.1, 0.1], [0.105], margin=0.01)]).findings[0]
    assert found.significant and found.outcome == "pass"


def test_a_worsening_above_the_margin_needs_significance() -> None:
    found = judge([figure([0.1, 0.2, 0.3, 0.2, 0.2], [0.3], margin=0.05)]).findings[0]
    assert found.worsening > found.margin and not found.significant
    assert found.outcome == "cannot tell" and re.search(r"\d+ (fresh )?seeds", found.needed)


def test_the_seeds_said_to_be_needed_are_enough() -> None:
    baseline = [0.1, 0.12, 0.08, 0.1, 0.1]
    unsure = judge([figure(baseline, [0.11], margin=0.035)]).findings[0]
    assert unsure.outcome == "cannot tell"
    seeds = int(unsure.needed.split()[0])
    assert unsure.needed.endswith("fresh seeds") and seeds > 1
    assert judge([figure(baseline, [0.11] * seeds, margin=0.035)]).outcome == "pass"
    assert judge([figure(baseline, [0.11] * (seeds - 1), margin=0.035)]).outcome == "cannot tell"


def test_documents_that_disagree_widen_the_interval_and_are_asked_for() -> None:
    baseline = [0.1, 0.1005, 0.0995, 0.1, 0.1]
    narrow = judge([figure(baseline, [0.1])]).findings[0]
    wide = judge([figure(baseline, [0.1], document_variance=0.02**2)]).findings[0]
    assert narrow.outcome == "pass" and wide.outcome == "cannot tell"
    assert wide.high > narrow.high and "documents" in wide.needed


def test_more_is_better_turns_the_sign() -> None:
    gains = [1.0, 1.01, 0.99, 1.0, 1.0]
    lost = judge([figure(gains, [0.5, 0.5], higher_is_better=True)]).findings[0]
    won = judge([figure(gains, [1.5, 1.5], higher_is_better=True)]).findings[0]
    assert (lost.outcome, won.outcome) == ("fail", "pass")
    assert lost.worsening == pytest.approx(0.5) and won.worsening == pytest.approx(-0.5)


def test_nothing_changed_at_all_passes_without_a_margin() -> None:
    assert judge([figure([0.0] * 5, [0.0], margin=0.0)]).outcome == "pass"


def test_seeds_that_agree_by_chance_are_not_believed_to_always_agree() -> None:
    equal, least = [0.1] * 5, 0.01  # 100 documents, all five seeds with the same 10 wrong
    found = judge([figure(equal, [0.13], least_spread=least, margin=0.02)]).findings[0]
    assert found.outcome == "cannot tell"
    assert judge([figure(equal, [0.13], margin=0.02)]).outcome == "fail"  # what it guards against


def test_the_worst_comes_first_and_decides() -> None:
    baseline = [0.1, 0.101, 0.099, 0.1, 0.1]
    found = judge([figure(baseline, [0.1], name="fine"), figure(baseline, [0.9], name="broken")])
    assert found.outcome == "fail" and [f.name for f in found.findings] == ["broken", "fine"]


def test_holm_keeps_the_family_and_rejects_more_than_bonferroni() -> None:
    rng = np.random.default_rng(1)
    wrong = [any(holm(list(rng.uniform(size=6)), 0.05)) for _ in range(4000)]
    assert np.mean(wrong) == pytest.approx(0.05, abs=0.012)
    assert holm([0.001, 0.012, 0.5, 0.02], 0.05) == [True, True, False, True]
    assert holm([0.02, 0.001], 0.02) == [True, True]  # Bonferroni would keep the first


def test_the_p_value_is_the_prediction_t_test_of_scipy_with_many_fresh_seeds() -> None:
    rng = np.random.default_rng(2)
    before, after = rng.normal(0, 1, 6), 0.8
    found = judge([figure(before, [after])]).findings[0]
    scale = before.std(ddof=1) * np.sqrt(1 + 1 / 6)
    assert found.p_value == pytest.approx(stats.t(5, loc=before.mean(), scale=scale).sf(after))


@pytest.mark.parametrize("interaction", [0.0, 0.3])
def test_document_variance_counts_what_documents_add_beyond_the_seeds(interaction: float) -> None:
    rng, (seeds, fresh, documents) = np.random.default_rng(3), (5, 2, 200)
    found, truth = [], interaction**2 / documents
    for _ in range(300):
        hard, changed = rng.normal(0, 1, documents), rng.normal(0, interaction, documents)
        before = hard + rng.normal(0, 0.5, (seeds, documents))
        after = hard + changed + rng.normal(0, 0.5, (fresh, documents))
        counts = np.ones(documents)
        noise = document_noise(before, counts) * (1 / seeds + 1 / fresh)
        found.append(document_variance(before.mean(0), after.mean(0), counts, noise=noise))
    unaware = 0.25 * (1 / seeds + 1 / fresh) / documents  # what it would say if seeds were not taken out
    assert truth * 0.9 <= np.mean(found) <= truth * 1.1 + 0.15 * unaware


def test_fewer_than_five_seeds_are_no_baseline() -> None:
    with pytest.raises(ValidationError, match="at least 5"):
        figure([0.1, 0.1, 0.1, 0.1], [0.1])


def test_margins_hold_two_deviations_and_sharpen_with_seeds() -> None:
    values = np.random.default_rng(4).normal(0, 1, 40)
    few, many = (margin_of(list(values[:n] / values[:n].std(ddof=1)), least=0.0) for n in (5, 40))
    assert few > many >= 2.0
    assert margin_of([0.1] * 5, least=0.01) == 0.01


def test_rounding_is_no_worsening_where_nothing_varies() -> None:
    assert judge([figure([0.0] * 5, [1e-12], margin=0.0)]).outcome != "fail"
    assert judge([figure([0.0] * 5, [1e-3], margin=0.0)]).outcome == "fail"


def test_documents_are_asked_for_where_no_number_of_seeds_would_do() -> None:
    wide = figure([0.1] * 5, [0.1], margin=0.001, document_variance=0.14**2)
    assert judge([wide]).findings[0].needed == "more than 6400 documents, or the baseline's own"
