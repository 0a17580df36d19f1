"""The gate: how often it fails honest runs, how often it sees a fault, and what it says when it cannot tell."""

import re

import numpy as np
import pytest
from pydantic import ValidationError
from scipy import stats

from cfsd.statistics.further_seeds import LAWS, OFF, _moments, chance
from cfsd.statistics.gate import (
    Guarded,
    document_noise,
    document_variance,
    judge,
    margin_factor_of,
    margin_of,
)
from cfsd.statistics.multiplicity import rejected

SPREAD = 0.02


def figure(baseline: object, fresh: object, **changes: object) -> Guarded:
    values = [float(v) for v in np.asarray(baseline)]
    settings = {
        "name": "forgetting/rev", "unit": "fraction", "higher_is_better": False, "baseline": values,
        "fresh": [float(v) for v in np.atleast_1d(np.asarray(fresh, dtype=float))],
        "margin": margin_of(values, least=0.01), "num_documents": 100,
    }  # fmt: skip
    return Guarded(**(settings | changes))


def judged(shift: float, *, runs: int, figures: int, fresh: int = 2, seeds: int = 5) -> dict[str, float]:
    """Return how often each outcome comes, one of `figures` normal ones being worse by `shift` spreads."""
    rng = np.random.default_rng(0)
    found = {"fail": 0, "pass": 0, "cannot tell": 0}
    for _ in range(runs):
        drawn = rng.normal(0.3, SPREAD, (figures, seeds + fresh))
        drawn[0, seeds:] += shift * SPREAD
        found[judge([figure(row[:seeds], row[seeds:], name=str(i)) for i, row in enumerate(drawn)]).outcome] += 1
    return {name: count / runs for name, count in found.items()}


@pytest.mark.parametrize("fresh", [1, 2])
def test_honest_runs_mostly_pass(fresh: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cfsd.statistics.gate.chance", lambda *_: 1.0)  # it takes 20 ms, and has no part in passing
    assert judged(0.0, runs=600, figures=8, fresh=fresh)["pass"] >= {1: 0.65, 2: 0.85}[fresh]


def test_a_fault_is_found() -> None:
    assert judged(25.0, runs=40, figures=2)["fail"] >= 0.95


def test_a_fault_in_one_of_two_fresh_seeds_is_neither_failed_nor_passed() -> None:
    baseline = [0.1, 0.1005, 0.0995, 0.1, 0.1]
    assert judge([figure(baseline, [0.1, 0.9])]).outcome == "cannot tell"
    assert judge([figure(baseline, [0.9, 0.9])]).outcome == "fail"


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


def test_of_a_fault_in_some_seeds_alone_no_number_of_further_ones_is_promised_to_decide() -> None:
    """Further seeds come on top of those that are there, and the least bad of all is judged."""
    baseline = [0.1, 0.101, 0.099, 0.1, 0.1]
    some = judge([figure(baseline, [0.15, 0.0999])]).findings[0]
    assert some.outcome == "cannot tell" and some.needed == "more than 20 seeds: not every seed is that much worse"
    worse = [0.15, 0.1012]
    few = judge([figure(baseline, worse)]).findings[0]
    count, words = few.needed.split(" ", 1)
    assert few.outcome == "cannot tell" and words == "fresh seeds" and int(count) > 2
    assert judge([figure(baseline, [*worse, *[0.15] * (int(count) - 2)])]).outcome == "fail"


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
    wrong = [any(rejected(list(rng.uniform(size=6)), 0.05)) for _ in range(4000)]
    assert np.mean(wrong) == pytest.approx(0.05, abs=0.012)
    assert rejected([0.001, 0.012, 0.5, 0.02], 0.05) == [True, True, False, True]
    assert rejected([0.02, 0.001], 0.02) == [True, True]  # Bonferroni would keep the first


@pytest.mark.parametrize("seeds", [5, 12])
@pytest.mark.parametrize("p", [0.2, 0.01, 0.01 / 8])
def test_one_fresh_normal_seed_is_judged_by_the_prediction_t_test_of_scipy_or_more_mildly(seeds: int, p: float) -> None:
    least = stats.t(seeds - 1).isf(p) * np.sqrt(1 + 1 / seeds)
    (mean, deviation), normal = _moments(LAWS[0], seeds), LAWS[0].above
    assert normal(mean + least * deviation).mean() == pytest.approx(p, rel=OFF - 1)
    assert chance(least, 1, seeds) >= p


def test_the_heavy_law_is_scipys_t_with_3_degrees() -> None:
    points = np.linspace(-20, 200, 50)
    assert LAWS[1].above(points) == pytest.approx(stats.t(3).sf(points), rel=1e-6)


def test_a_fresh_heavy_seed_is_as_bad_as_often_as_simulated() -> None:
    """Truth by 400,000 simulated baselines and fresh seeds, others than the gate's own: within 5 % of itself."""
    drawn = np.random.default_rng(9).standard_t(3, (400_000, 6))
    least = (drawn[:, 5] - drawn[:, :5].mean(1)) / drawn[:, :5].std(1, ddof=1)
    for p in (0.01, 0.005):
        assert chance(float(np.quantile(least, 1 - p)), 1, 5) == pytest.approx(p * OFF, rel=0.05)


# --- figures judged as ratios

KLS = [0.0020, 0.0025, 0.0030, 0.0022, 0.0028]


def ratio(fresh: object, baseline: object = KLS, **changes: object) -> Guarded:
    factor = margin_factor_of(KLS, least=0.0)
    return figure(baseline, fresh, **({"as_ratio": True, "unit": "nats/token", "margin": factor} | changes))


def test_a_ratio_is_the_same_at_every_size() -> None:
    small, large = (
        judge([ratio(np.multiply(scale, [0.004, 0.005]), baseline=[scale * kl for kl in KLS])]).findings[0]
        for scale in (1.0, 100.0)
    )
    assert np.exp(small.worsening) == pytest.approx(np.sqrt(0.004 * 0.005) / stats.gmean(KLS))
    for name in ("worsening", "low", "high", "p_value", "margin"):
        assert getattr(small, name) == pytest.approx(getattr(large, name))
    assert large.after == pytest.approx(100 * np.sqrt(0.004 * 0.005))
    assert small.before == pytest.approx(stats.gmean(KLS))


def test_a_margin_of_a_ratio_is_a_factor() -> None:
    logs = np.log(KLS)
    assert np.log(margin_factor_of(KLS, least=0.0)) == pytest.approx(margin_of(list(logs), least=0.0))
    assert margin_factor_of([0.01] * 5, least=0.005) == pytest.approx(1.5)  # 0.005 nats more than 0.01
    just = judge([ratio([1.2 * stats.gmean(KLS)], baseline=[stats.gmean(KLS)] * 5, margin=1.21)])
    over = judge([ratio([1.2 * stats.gmean(KLS)], baseline=[stats.gmean(KLS)] * 5, margin=1.19)])
    assert (just.outcome, over.outcome) == ("pass", "fail")


def test_what_has_no_logarithm_counts_as_not_moved() -> None:
    assert judge([ratio([0.0, 1e-9], baseline=[0.0, 1e-8, -1e-9, 2e-7, 0.0], margin=1.0)]).outcome == "pass"
    assert judge([ratio([0.1, 0.1], baseline=[0.0] * 5, margin=2.0)]).outcome == "fail"


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


@pytest.mark.parametrize("sd", [0.015, 0.045, 0.08])
def test_on_other_documents_an_unchanged_program_fails_as_rarely(sd: float) -> None:
    """Another probe is harder or easier for all fresh seeds alike: 5 to 14 % of honest programs failed."""
    random, trials, documents = np.random.default_rng(3), 3000, 0.045
    failed = dict.fromkeys((True, False), 0)
    for _ in range(trials):
        shift = random.normal(0, documents * np.sqrt(2))
        known = np.exp(random.normal(0, sd, 5))
        fresh = np.exp(random.normal(0, sd, 2) + shift)
        measured = Guarded(
            name="probe_kl", unit="nats/token", higher_is_better=False, baseline=tuple(known), fresh=tuple(fresh),
            margin=margin_factor_of(list(known), least=1e-6), as_ratio=True, document_variance=2 * documents**2,
            num_documents=256, same_documents=False,
        )  # fmt: skip
        for same in failed:
            failed[same] += judge([measured.model_copy(update={"same_documents": same})]).outcome == "fail"
    assert failed[False] / trials <= 0.01
    assert sd > 0.045 or failed[True] > failed[False]
