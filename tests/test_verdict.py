"""The verdict, from figures alone: two sentences that claim no more than the intervals allow."""

import re

import pytest

from cfsd.report.table import forgotten_of, shown
from cfsd.report.verdict import FEW_SEEDS, MANY_SEEDS, remarks, two_sentences, verdict
from cfsd.statistics import seeds
from cfsd.statistics.discoveries import detectable_mean
from cfsd.statistics.figures import Figure
from tests.test_report import benchmark, figure, summary


def test_verdict_says_forgot_only_when_zero_is_outside() -> None:
    assert "It forgot: it lost 5.00 [3.00, 7.00] points" in verdict([summary("a", 0.05)])
    assert verdict([summary("a", 0.05, gain=None)]).startswith("“a” forgot: it lost")
    unsure = verdict([summary("a", 0.01)])
    assert "It forgot" not in unsure
    assert "No forgetting was found" in unsure
    assert (
        ", where a mean drop of 20 points would have been found with 80 % probability" in unsure
    )  # 0.1, stretched by 2
    assert "so it gained" in verdict([summary("a", -0.05)])


def test_verdict_names_a_benchmark_that_alone_became_worse() -> None:
    mixed = summary("a", 0.01)
    worse = mixed.model_copy(update={"benchmarks": {"b": benchmark(0.0, 0.05), "c": benchmark(0.2, 0.05)}})
    assert ", but worse by itself: c (90.0 → 70.0 %);" in verdict([worse])
    loss = benchmark(0.2, 0.05) | {"chance_corrected": None}
    assert "points on average over 1 benchmark, where" in verdict(
        [mixed.model_copy(update={"benchmarks": {"b": benchmark(0.0, 0.05), "wiki": loss}})]
    )
    chance = mixed.model_copy(update={"benchmarks": {"c": benchmark(0.2, 0.05, q_value=0.06)}})
    assert "worse by itself" not in verdict([chance])  # among many, one such is no finding


@pytest.mark.parametrize("other, apart", [(0.5, True), (0.13, True), (0.115, False), (0.1, False)])
def test_verdict_says_moved_less_only_when_intervals_are_apart(other: float, apart: bool) -> None:
    said = verdict([summary("a", 0.05, kl=other), summary("b", 0.05, kl=0.1)])
    assert ("“b” moved less from the base model than “a”" in said) == apart
    assert ("In how far they moved from the base model, no variant is certainly ahead" in said) != apart


@pytest.mark.parametrize("other, apart", [(1.5, True), (1.15, False)])
def test_verdict_says_learned_more_only_when_intervals_are_apart(other: float, apart: bool) -> None:
    said = verdict([summary("a", 0.05, gain=1.0), summary("b", 0.05, gain=other)])
    assert ("“b” learned more of the target than “a”" in said) == apart
    assert ("In what they gained on the target, no variant is certainly ahead" in said) != apart


def test_verdict_compares_with_each_of_several() -> None:
    said = verdict([summary("a", 0.5), summary("b", 0.01), summary("c", 0.03), summary("d", 0.3)])
    own = "1.00 [-1.00, 3.00] points on average"
    assert f"“b” forgot less than “a” and “d”: {own} against at least 30.0 [28.0, 32.0]" in said
    assert "not told apart from “c”" in said
    assert "no forgetting was found in “b”, where a mean drop of" in said


def test_verdict_counts_repeats_as_one_variant() -> None:
    repeats = [
        summary("a seed=0", 0.10),
        summary("a seed=1", 0.30),
        summary("b seed=0", 0.11),
        summary("b seed=1", 0.05),
    ]
    said = verdict(repeats)
    assert "In what they forgot, no variant is certainly ahead" in said  # a's lowest, 8 to 12 points, overlaps with b's
    assert "seed=" not in said.replace(FEW_SEEDS, "") and FEW_SEEDS in said


def test_from_five_seeds_on_the_interval_is_over_seeds() -> None:
    values = [0.06, 0.08, 0.1, 0.12, 0.14]
    said = verdict([summary(f"a seed={i}", value) for i, value in enumerate(values)])
    joined = seeds.over_seeds([Figure(**figure(value, 0.02)) for value in values]).figure
    assert f"it lost {shown(joined.model_dump(), 100)} points" in said and MANY_SEEDS in said
    assert joined.low is not None and joined.high is not None
    four = verdict([summary(f"a seed={i}", value) for i, value in enumerate(values[:4])])
    assert "it lost 9.00 [4.00, 14.0] points" in four  # what every one of the four says
    mixed = [summary("a seed=0", 0.1), summary("a seed=1", 0.01)]
    assert "It forgot" not in verdict(mixed)  # one of the two does not say so


def test_a_benchmark_is_worse_only_where_every_seed_says_so() -> None:
    sure, unsure = (
        summary(f"a seed={i}", 0.01).model_copy(update={"benchmarks": {"c": benchmark(lost, 0.05)}})
        for i, lost in enumerate((0.2, 0.01))
    )
    assert "worse by itself: c" in verdict([sure, sure.model_copy(update={"name": "a seed=2"})])
    assert "worse by itself" not in verdict([sure, unsure])


def test_of_several_variants_each_benchmark_that_became_worse_is_named() -> None:
    found = {"b": benchmark(0.0, 0.05), "c": benchmark(0.2, 0.05)}
    said = verdict([summary("a", 0.5), summary("b", 0.0).model_copy(update={"benchmarks": found})])
    assert "80 % probability, but worse by itself: c (90.0 → 70.0 %)." in said
    assert "Worse at single benchmarks: “a” at b (90.0 → 65.0 %); “b” at c (90.0 → 70.0 %)." in said


def test_the_headline_is_two_sentences_at_most() -> None:
    cases = [[summary("a", lost)] for lost in (0.05, 0.01, -0.05)]
    for losses in ({"a": 0.5, "b": 0.1, "c": 0.3}, {"a": 0.1, "b": 0.1}):
        cases.append([summary(name, lost) for name, lost in losses.items()])
    for case in cases:
        said = two_sentences(case)
        assert len(said) == 2
        assert [len(re.findall(r"[.!?](?= [A-Z“]|$)", sentence)) for sentence in said] == [1, 1]
    several = [summary("a", 0.5), summary("b", 0.1, kl=0.5, gain=2.0)]
    assert len(two_sentences(several)) == 2 and remarks(several)[0].startswith(
        "“b” learned more"
    )  # the third comparison is not lost


def test_where_nothing_was_found_the_power_is_said_without_a_mean_too() -> None:
    loss = benchmark(0.0, 0.05) | {"forgetting": figure(0.0, 0.05, "nats/token"), "chance_corrected": None}
    alone = summary("a", 0.0).model_copy(update={"mean_forgetting": None, "benchmarks": {"wiki": loss}})
    found = "No forgetting was found on 1 benchmark, where a drop of 0.1 nats/token would have been found"
    assert found in verdict([alone])
    shares = {"b": benchmark(0.0, 0.05), "c": benchmark(0.0, 0.05, 0.2)}
    both = alone.model_copy(update={"benchmarks": shares})
    assert "on 2 benchmarks, where a drop of 20 points on each would have been found" in verdict([both])
    mixed = alone.model_copy(update={"benchmarks": shares | {"wiki": loss}})
    assert "(b: a drop of 10 points would" in verdict([mixed]) and "wiki: a drop of 0.1 nats/token" in verdict([mixed])


def test_verdict_without_interval_claims_nothing() -> None:
    bare = {"value": 0.0, "low": None, "high": None, "unit": "fraction"}
    few = [summary("a", 0.3), summary("b", 0.0).model_copy(update={"mean_forgetting": bare})]
    assert "In what they forgot, no variant is certainly ahead" in verdict(few)
    for said in (verdict(few), verdict(few[1:])):
        assert "It forgot" not in said and "No forgetting was found" not in said
    unlearned = few[0].model_copy(update={"target_gain": bare})
    assert "too few to say whether “a” learned" in verdict([unlearned])


def test_detectable_drop_shrinks_with_more_benchmarks() -> None:
    one = summary("a", 0.0)
    four = one.model_copy(update={"benchmarks": {str(i): benchmark(0.0, 0.01) for i in range(4)}})
    assert detectable_mean(forgotten_of(one)) == pytest.approx(0.2)
    assert detectable_mean(forgotten_of(four)) == pytest.approx(0.1)
    unknown = one.model_copy(update={"benchmarks": {"b": benchmark(0.0, 0.1, None)}})
    assert detectable_mean(forgotten_of(unknown)) == pytest.approx(0.2 * 2.8 / 1.96, rel=1e-3)
    still = one.model_copy(update={"benchmarks": {"b": benchmark(0.0, 0.0, None)}})
    assert detectable_mean(forgotten_of(still)) is None  # all documents alike say nothing of the scatter
