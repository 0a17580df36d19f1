"""Many benchmarks: how often a finding is false, and what is said of those where nothing was found."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from cfsd.statistics.discoveries import change_of, controlled, false_discovery, finding, power_of
from cfsd.statistics.forgetting import BenchmarkForgetting, Measure, benchmark_forgetting
from cfsd.statistics.intervals import mcnemar_p

ACCURACY = Measure(metric="acc", higher_is_better=True, chance=0.25, kind="binary")
LOSS = Measure(metric="loss", higher_is_better=False, chance=None, kind="mean")


def scored(name: str, measure: Measure, before: list[float], after: list[float]) -> BenchmarkForgetting:
    ids = range(len(before))
    frames = (
        pd.DataFrame({"doc_id": ids, "filter": "none", "doc_hash": "same", "value": values, "count": 1.0})
        for values in (before, after)
    )
    return benchmark_forgetting(name, measure, *frames)


def flipped(name: str, lost: int, gained: int, total: int = 200) -> BenchmarkForgetting:
    same = [1.0] * (total - lost - gained)
    return scored(name, ACCURACY, [1.0] * lost + [0.0] * gained + same, [0.0] * lost + [1.0] * gained + same)


def changes(entries: list[BenchmarkForgetting]) -> dict[str, str]:
    return {entry.benchmark: change_of(entry) for entry in controlled(entries)}


def test_q_values_are_the_step_up_of_benjamini_and_hochberg() -> None:
    flips = [(20, 2), (9, 3), (4, 4), (1, 0), (3, 14)]
    entries = [flipped(str(i), *counts) for i, counts in enumerate(flips)]
    p = np.array([mcnemar_p(*counts) for counts in flips])
    order, total = np.sort(p), len(p)
    steps = [min(order[k] * total / (k + 1) for k in range(total) if order[k] >= at) for at in p]
    assert [entry.q_value for entry in controlled(entries)] == pytest.approx(np.minimum(steps, 1))
    assert [entry.q_value for entry in entries] == [None] * 5
    assert controlled([]) == []


def test_a_finding_alone_may_be_none_among_many() -> None:
    one = flipped("one", 10, 2)
    assert one.p_value is not None and 0.03 < one.p_value < 0.05
    assert changes([one]) == {"one": "worse"}
    among = changes([one, *(flipped(str(i), 4, 4) for i in range(9))])
    assert len(among) == 10 and set(among.values()) == {"unsettled"}


def test_findings_have_a_direction() -> None:
    found = changes([flipped("lost", 30, 2), flipped("won", 2, 30), flipped("same", 3, 3)])
    assert found == {"lost": "worse", "won": "better", "same": "unsettled"}


def test_of_the_findings_at_most_5_percent_are_false() -> None:
    rng, shares, named = np.random.default_rng(0), [], 0
    drops = np.array([0.06] * 6 + [0.0] * 14)  # of 1000 documents, of which one in ten changes
    lost = rng.binomial(1000, (0.1 + drops) / 2, (1500, 20))
    gained = rng.binomial(1000, (0.1 - drops) / 2, (1500, 20))
    p = np.minimum(1.0, 2 * stats.binom.cdf(np.minimum(lost, gained), lost + gained, 0.5))
    alone = 0.0
    for row in p:
        called = stats.false_discovery_control(row) <= 0.05
        shares.append((called & (drops == 0)).sum() / max(1, called.sum()))
        named += called[drops > 0].sum()
        alone += ((row <= 0.05) & (drops == 0)).any() / len(p)
    assert np.mean(shares) <= 0.05
    assert named / (6 * len(p)) > 0.95
    assert alone > 0.3  # without control: a false finding in more than 3 studies of 10


def test_power_stands_beside_nothing_found() -> None:
    nothing = flipped("same", 3, 3)
    assert nothing.detectable is not None
    drop = f"a drop of {100 * nothing.detectable:.2g} points would have been found with 80 % probability"
    assert finding(nothing) == f"no forgetting found ({drop})"
    assert finding(flipped("lost", 30, 2)) == "worse"
    assert finding(flipped("lost", 10, 2).model_copy(update={"q_value": 0.4})).startswith("no forgetting found")
    assert power_of(flipped("tiny", 0, 0, total=3)) == "with 3 documents no drop would have been found"
    assert power_of(scored("few", LOSS, [1.0, 2.0], [1.0, 3.0])).startswith("2 documents do not tell")
    assert power_of(scored("loss", LOSS, list(np.arange(9.0)), list(np.arange(9.0) ** 1.01))).endswith(
        "loss would have been found with 80 % probability"
    )


def test_a_p_of_nearly_equal_counts_is_no_more_than_1_after_rounding() -> None:
    """P(more than half of an odd count) is 1/2; doubled it was 1 and a bit, which the adjustment refuses."""
    p_values = [mcnemar_p(k, k + 1) for k in range(500)]
    assert p_values == pytest.approx([1.0] * 500) and max(p_values) <= 1
    assert max(false_discovery(p_values)) <= 1


@pytest.mark.parametrize("tested", [1, 10, 40])
def test_a_drop_that_is_called_detectable_is_found_beside_the_other_benchmarks(tested: int) -> None:
    """One of `tested` benchmarks drops by what is printed, 6 % of its 1000 documents change in any case."""
    changed, documents, rng = 0.06, 1000, np.random.default_rng(tested)
    quiet = [flipped(f"quiet {i}", 30, 30, total=documents) for i in range(tested)]
    drop = controlled(quiet)[0].detectable
    assert drop is not None
    lost = rng.binomial(documents, np.array([changed / 2] * tested)[:, None], (tested, 4000))
    gained = rng.binomial(documents, np.array([changed / 2] * tested)[:, None], (tested, 4000))
    lost[0] = rng.binomial(documents, (changed + drop) / 2, 4000)
    gained[0] = rng.binomial(documents, (changed - drop) / 2, 4000)
    p = np.minimum(1.0, 2 * stats.binom.cdf(np.minimum(lost, gained), lost + gained, 0.5))
    found = stats.false_discovery_control(p, axis=0)[0] <= 0.05
    assert 0.72 < found.mean() < 0.86
