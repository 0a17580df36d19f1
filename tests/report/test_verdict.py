"""The verdict, from figures alone: two sentences that claim no more than intervals and paired comparisons allow."""

import re
from itertools import combinations
from typing import Any

import pytest

from cfsd.report.compared import Compared, Comparisons
from cfsd.report.summary import Summary
from cfsd.report.table import forgotten_of, shown
from cfsd.report.verdict import (
    COMPARED,
    FEW_SEEDS,
    MANY_SEEDS,
    ONE_SEED,
    over_seeds,
    remarks,
    two_sentences,
    variants_of,
    verdict,
)
from cfsd.statistics import seeds
from cfsd.statistics.discoveries import detectable_mean
from cfsd.statistics.figures import Figure
from tests.report.test_report import benchmark, figure, summary

BARE = {"value": 0.3, "low": None, "high": None, "unit": "fraction"}
UNSEEN = "with 100 documents each, losses under 10 points may stay invisible"


# of the intervals of differences
HALVES = {"target_gain": 0.05, "probe_kl": 0.002, "chat_kl": 0.002, "mean_forgetting": 0.01}


def with_benchmarks(one: Summary, **benchmarks: Any) -> Summary:
    return one.model_copy(update={"benchmarks": benchmarks})


def paired(summaries: list[Summary], **halves: float | None) -> Comparisons:
    """The differences of all variants with intervals of HALVES or `halves`; None: too few units to say."""
    found = []
    for one, other in combinations(variants_of(summaries), 2):
        for measure, of_variant in zip(COMPARED, ("gain", "moved", "in_chats", "lost"), strict=True):
            ours, theirs, half = getattr(one, of_variant), getattr(other, of_variant), (HALVES | halves)[measure]
            if ours is None or theirs is None:
                continue
            value = ours["value"] - theirs["value"]
            p = None if half is None else 0.001 if abs(value) > half else 0.5
            ends = {} if half is None else {"low": value - half, "high": value + half}
            found.append(Compared.model_validate({
                "one": one.name, "other": other.name, "measure": measure, "value": value, "low": None, "high": None,
                **ends, "unit": ours["unit"], "p_value": p, "adjusted_p": p, "seeds": 1, "paired": True,
            }))  # fmt: skip
    return Comparisons(found)


def compared(summaries: list[Summary], **halves: float | None) -> list[str]:
    return two_sentences(summaries, paired(summaries, **halves))


def test_what_two_variants_are_to_each_other_is_said_in_two_sentences() -> None:
    said = compared([summary("finetune", 0.01, kl=0.5), summary("rehearse", 0.01, kl=0.1)])
    assert said == [
        "“rehearse” is not shown to differ in learning from “finetune” (difference 0 [-0.0500, 0.0500] nats per token) "
        "and moved a fifth as far from the base (difference -0.400 [-0.402, -0.398] nats per token).",
        f"No benchmark shows a loss for either; {UNSEEN}.",
    ]
    unequal = [summary("finetune", 0.2, kl=0.5, gain=1.5), summary("rehearse", 0.01, kl=0.1)]
    lost = compared(unequal)
    assert lost == [
        "“finetune” learned more than “rehearse” (difference 0.500 [0.450, 0.550] nats per token), moved 5.00 times as "
        "far from the base (difference 0.400 [0.398, 0.402] nats per token) and lost more on benchmarks (19.0 [18.0, "
        "20.0] points).",
        "“finetune” lost 20.0 [18.0, 22.0] points above chance on 1 benchmark and became worse at b (90.0 → 80.0 %); "
        f"no benchmark shows a loss for “rehearse”; {UNSEEN}.",
    ]
    assert remarks(unequal, paired(unequal)) == [
        "“finetune” and “rehearse” did not learn equally (they differ by 33.3 % of the larger gain): what they lost is "
        "not compared at equal gain.",
        ONE_SEED,
    ]


def test_variants_that_differ_in_any_measure_are_not_called_alike() -> None:
    three = [summary("a", 0.5, kl=0.8), summary("b", 0.01, kl=0.2), summary("c", 0.01, kl=0.2)]
    known = paired(three)
    assert "is not distinguishable from “c”" in two_sentences(three, known)[0]
    apart = known.of("b", "c", "probe_kl")
    assert apart is not None
    differs = {
        "measure": "benchmarks/facts",
        "value": 0.25,
        "low": 0.2,
        "high": 0.3,
        "p_value": 1e-7,
        "adjusted_p": 1e-7,
    }
    more = Comparisons([*known.entries, apart.model_copy(update=differs)])
    assert "distinguishable" not in two_sentences(three, more)[0]


def test_an_interval_of_a_divergence_over_seeds_ends_at_0() -> None:
    one, values = summary("a", 0.1), (0.02, 0.03, 0.02, 0.03, 0.33)
    repeats = [one.model_copy(update={"probe_kl": figure(v, 0.001), "target_gain": figure(v, 0.001)}) for v in values]
    joined = over_seeds(repeats, "probe_kl")
    assert joined and joined["low"] == 0 < joined["high"]
    below = over_seeds(repeats, "target_gain")
    assert below and below["low"] < 0


def test_variants_of_another_base_or_target_are_not_compared() -> None:
    apart = [summary("a", 0.01, kl=0.5), summary("b", 0.01, kl=0.1)]
    assert two_sentences(apart)[0].startswith("No benchmark shows a loss")
    (remark,) = remarks(apart)
    assert remark.startswith("“a” and “b” were not compared with each other: another base or target")
    three = [*apart, summary("c", 0.01)]
    remark, _ = remarks(three, paired(apart))
    assert remark.startswith("“c” was not compared with the other variants")


def test_differences_that_are_not_paired_are_said_to_be_so() -> None:
    two = [summary("a", 0.01, kl=0.5), summary("b", 0.01, kl=0.1)]
    elsewhere = Comparisons(
        entry.model_copy(update={"paired": entry.measure != "probe_kl"}) for entry in paired(two).entries
    )
    remark, _ = remarks(two, elsewhere)
    assert remark.startswith("Some variants were measured on other units: their differences in probe_kl are not paired")


def test_one_variant_is_spoken_of_with_its_figures() -> None:
    assert two_sentences([summary("a", 0.01)]) == [
        "“a” learned the target (its held-out loss fell by 1.00 [0.900, 1.10] nats per token) and moved 0.100 [0.0900, "
        "0.110] nats per token from the base.",
        f"No benchmark shows a loss; {UNSEEN}.",
    ]
    assert two_sentences([summary("a", 0.01, gain=None, kl=None)]) == [f"No benchmark shows a loss; {UNSEEN}."]
    moved = summary("a", 0.01, gain=None)
    assert two_sentences([moved])[0] == "“a” moved 0.100 [0.0900, 0.110] nats per token from the base."
    bare = with_benchmarks(moved).model_copy(update={"mean_forgetting": None, "probe_kl": figure(0.0, 0.0)})
    assert two_sentences([bare]) == ["“a” did not move from the base."]
    assert two_sentences([bare.model_copy(update={"probe_kl": None})]) == []


@pytest.mark.parametrize(
    "gain, words",
    [
        (figure(-1.0, 0.1), "“a” became worse at the target (gain -1.00 [-1.10, -0.900] nats per token)"),
        (figure(0.05, 0.1), "“a” is not shown to have learned the target (gain 0.0500 [-0.0500, 0.150] nats"),
        (BARE, "“a” has too few held-out rows to say whether it learned the target (gain 0.300 nats per token)"),
    ],
)
def test_a_gain_is_claimed_only_where_its_interval_is_above_zero(gain: dict[str, Any], words: str) -> None:
    assert verdict([summary("a", 0.05).model_copy(update={"target_gain": gain})]).startswith(words)


def test_a_loss_is_claimed_only_where_zero_is_outside() -> None:
    assert "It lost 5.00 [3.00, 7.00] points above chance on 1 benchmark and became worse at b" in verdict(
        [summary("a", 0.05)]
    )
    assert verdict([summary("a", 0.05, gain=None, kl=None)]).startswith("“a” lost 5.00 [3.00")
    unsure = verdict([summary("a", 0.01)])
    assert " lost " not in unsure and f"No benchmark shows a loss; {UNSEEN}." in unsure
    assert "It lost -5.00 [-7.00, -3.00] points above chance on 1 benchmark, which is a gain." in verdict(
        [summary("a", -0.05)]
    )
    few = summary("a", 0.0).model_copy(update={"mean_forgetting": BARE})
    assert "It has too few documents to say whether it lost anything (30.0 points above chance" in verdict([few])
    assert "no benchmark" not in verdict([few]).lower()


def test_a_benchmark_that_alone_became_worse_is_named_with_its_scores() -> None:
    mixed = summary("a", 0.01)
    worse = with_benchmarks(mixed, b=benchmark(0.0, 0.05), c=benchmark(0.2, 0.05))
    assert verdict([worse]).endswith(
        f"It became worse at c (90.0 → 70.0 %); no other benchmark shows a loss; {UNSEEN}."
    )
    chance = with_benchmarks(mixed, c=benchmark(0.2, 0.05, q_value=0.06))
    assert "became worse" not in verdict([chance])  # among many, one such is no finding
    several = verdict([summary("a", 0.5), worse.model_copy(update={"name": "b"})])
    assert (
        "“a” lost 50.0 [48.0, 52.0] points above chance on 1 benchmark and became worse at b (90.0 → 65.0 %)" in several
    )
    assert "; “b” became worse at c (90.0 → 70.0 %); no other benchmark shows a loss; with 100" in several
    seeds = [
        with_benchmarks(mixed, c=benchmark(fall, 0.05)).model_copy(update={"name": f"a seed={seed}"})
        for seed, fall in enumerate((0.2, 0.3, 0.7))
    ]
    assert "became worse at c (90.0 → 50.0 %)" in verdict(seeds)  # the mean of 70, 60 and 20
    average = with_benchmarks(summary("a", 0.05), b=benchmark(0.05, 0.2, q_value=0.3))
    assert "on 1 benchmark; no single benchmark shows a loss" in verdict([average])
    loss = benchmark(0.2, 0.05) | {"chance_corrected": None}
    lost = with_benchmarks(summary("a", 0.1), b=benchmark(0.0, 0.05), wiki=loss)
    assert "on 1 benchmark and became worse at wiki" in verdict([lost])  # wiki is not in the mean


NOT_SHOWN = "is not shown to have moved more or less far from the base"


@pytest.mark.parametrize(
    "other, words",
    [
        (0.5, "moved a fifth as far from the base"),
        (0.235, "moved 0.426 times as far from the base"),
        (0.13, "moved 0.769 times as far from the base"),
        (0.115, "moved 0.870 times as far from the base"),  # their intervals overlap
        (0.1015, NOT_SHOWN),
        (0.1, NOT_SHOWN),
        (1.0, "moved a tenth as far from the base"),
        (2.4, "moved 1/24 as far from the base"),
    ],
)
def test_moving_less_is_said_where_the_paired_difference_shows_it(other: float, words: str) -> None:
    both = [summary("a", 0.05, kl=other), summary("b", 0.05, kl=0.1)]
    first, second = ("b", "a") if other > 0.1 else ("a", "b")
    said = compared(both)[0]
    assert said.startswith(f"“{first}” is not shown to differ in learning from “{second}” (difference 0 [")
    assert f"nats per token) and {words} (difference " in said
    alone = [s.model_copy(update={"target_gain": None}) for s in both]
    against = f" than “{second}”" if words == NOT_SHOWN else f" as “{second}”"
    assert compared(alone)[0].startswith(f"“{first}” {words}{against} (difference ")


@pytest.mark.parametrize("other, apart", [(1.5, True), (1.15, True), (1.04, False)])
def test_learning_more_is_said_where_the_paired_difference_shows_it(other: float, apart: bool) -> None:
    said = compared([summary("a", 0.05, gain=1.0), summary("b", 0.05, gain=other)])[0]
    assert ("“b” learned more than “a” (difference" in said) == apart
    assert ("“b” is not shown to differ in learning from “a” (difference 0.0400 [-0.0100, 0.0900]" in said) != apart
    assert "as much as" not in said


def test_a_little_less_learned_is_said_but_does_not_decide_which_variant_is_spoken_of() -> None:
    two = [summary("a", 0.05, gain=2.0, kl=0.5), summary("b", 0.05, gain=1.92)]
    assert compared(two)[0].startswith(
        "“b” learned less than “a” (difference -0.0800 [-0.130, -0.0300] nats per token)"
    )
    assert "did not learn equally" in remarks(two, paired(two))[0]
    two[1] = summary("b", 0.05, gain=1.88)
    assert compared(two)[0].startswith("“a” learned more than “b” (difference 0.120 [")


def test_that_neither_is_shown_to_have_learned_is_said_too() -> None:
    said = compared([summary("a", 0.05, gain=0.0), summary("b", 0.05, gain=0.02, kl=0.05)])[0]
    assert said.startswith(
        "“b” is not shown to have learned the target (gain 0.0200 [-0.0800, 0.120] nats per token), is"
    )
    few = [s.model_copy(update={"target_gain": BARE, "probe_kl": BARE}) for s in (summary("a", 0.1), summary("b", 0.1))]
    said = compared(few, target_gain=None, probe_kl=None)[0]
    assert said.startswith(
        "“a” has too few held-out rows to say whether it learned more or less than “b” (difference 0 "
    )
    assert "and may have moved 1.00 times as far" in said


def test_seeds_that_change_nothing_are_said() -> None:
    still, moved = [summary(f"a seed={n}", 0.01) for n in range(3)], [summary(f"b seed={n}", 0.01) for n in range(3)]
    moved[2] = moved[2].model_copy(update={"probe_kl": figure(0.1001, 0.01)})
    said = [remark for remark in remarks([*still, *moved]) if "the same figures to the last digit" in remark]
    assert len(said) == 1 and said[0].startswith("The seeds of “a” gave")


@pytest.mark.parametrize(
    ("gain", "first"),
    [
        (-0.5, "became worse at the target (gain -0.500 [-0.600, -0.400] nats per token)"),
        (0.0, "is not shown to have learned the target (gain 0 [-0.100, 0.100] nats per token)"),
    ],
)
def test_of_one_that_learned_nothing_it_is_not_said_that_it_learned_more(gain: float, first: str) -> None:
    said = compared([summary("idle", 0.01, gain=gain), summary("hot", 0.01, gain=-1.0)])[0]
    apart = f"has a lower held-out loss than “hot” (difference in gain {1 + gain:.3g}"
    assert said.startswith(f"“idle” {first}, {apart}")
    assert "learned more" not in said


def test_a_model_that_did_not_move_is_compared_by_its_figures() -> None:
    said = compared([summary("a", 0.05), summary("b", 0.05, kl=0.0)])[0]
    assert "and moved 0 nats per token from the base, against 0.100 (difference -0.100 [" in said

    alone = [summary("a", 0.05, gain=None), summary("b", 0.05, kl=0.0, gain=None)]
    assert compared(alone)[0].startswith("“b” moved 0 nats per token from the base, against 0.100 of “a” (difference")


def test_the_best_is_compared_with_one_that_it_can_be_compared_with() -> None:
    elsewhere, two = summary("a", 0.01, kl=0.5), [summary("b", 0.01, kl=0.1), summary("c", 0.01, kl=0.5)]
    said = two_sentences([elsewhere, *two], paired(two))[0]
    assert said.startswith("Of 3 variants, “b” is not shown to differ in learning from “c” (difference")


def test_the_share_by_which_learning_differs_is_of_the_larger_gain() -> None:
    four_fifths = " (they differ by 80.0 % of the larger gain)"
    for gains, share in (((0.5, 0.1), four_fifths), ((0.5, -0.1), ""), ((0.0, -0.5), ""), ((-0.1, -0.5), "")):
        two = [summary(name, 0.01, gain=gain) for name, gain in zip("ab", gains, strict=True)]
        remark, _ = remarks(two, paired(two))
        assert remark == f"“a” and “b” did not learn equally{share}: what they lost is not compared at equal gain."


def test_of_several_the_one_that_moved_least_among_those_that_learned_most_is_compared_with_the_first() -> None:
    several = [
        summary("a", 0.5, kl=0.8), summary("b", 0.01, kl=0.2), summary("c", 0.03, kl=0.2), summary("d", 0.3, gain=0.2),
    ]  # fmt: skip
    learned, lost = compared(several, mean_forgetting=0.03)
    assert learned == (
        "Of 4 variants, “b” is not shown to differ in learning from “a” (difference 0 [-0.0500, 0.0500] nats per "
        "token), moved a quarter as far from the base (difference -0.600 [-0.602, -0.598] nats per token), lost less "
        "on benchmarks (-49.0 [-52.0, -46.0] points) and is not distinguishable from “c”."
    )  # d moved least, but learned less
    assert lost.startswith("“a” lost 50.0 [48.0, 52.0] points above chance")
    assert "; “c” lost 3.00 [1.00, 5.00] points" in lost and "; “d” lost 30.0 [28.0, 32.0] points" in lost
    assert lost.endswith(f"; no benchmark shows a loss for “b”; {UNSEEN}.")
    unmeasured = [
        s.model_copy(update={"target_gain": None, "probe_kl": None, "mean_forgetting": None}) for s in several
    ]
    assert compared(unmeasured)[0].startswith("“a” became worse at b")
    many = compared([summary(f"v{i}", 0.5) for i in range(6)])[1]
    assert many.count("lost 50.0 [48.0, 52.0]") == 3 and many.endswith("; benchmarks of 3 more changed.")
    assert compared([summary(f"v{i}", 0.0) for i in range(3)])[1].startswith(
        "No benchmark shows a loss for any variant; with 100"
    )


def test_repeats_count_as_one_variant() -> None:
    repeats = [summary("a seed=0", 0.10, kl=0.2), summary("a seed=1", 0.30, kl=0.3),
               summary("b seed=0", 0.11, kl=0.1), summary("b seed=1", 0.05, kl=0.22)]  # fmt: skip
    said = verdict(repeats, paired(repeats))
    assert said.startswith("“b” is not shown to differ in learning from “a”")
    assert "“a” lost 20.0 [8.00, 32.0] points" in said and "“b” lost 8.00 [3.00, 13.0] points" in said
    assert "seed=" not in said.replace(FEW_SEEDS, "") and FEW_SEEDS in said


def test_from_five_seeds_on_the_interval_is_over_seeds() -> None:
    values = [0.06, 0.08, 0.1, 0.12, 0.14]
    said = verdict([summary(f"a seed={i}", value) for i, value in enumerate(values)])
    joined = seeds.over_seeds([Figure(**figure(value, 0.02)) for value in values])
    assert f"It lost {shown(joined.model_dump(), 100)} points" in said and MANY_SEEDS in said
    assert joined.low is not None and joined.high is not None
    four = verdict([summary(f"a seed={i}", value) for i, value in enumerate(values[:4])])
    assert "It lost 9.00 [4.00, 14.0] points" in four  # what every one of the four says
    mixed = [summary("a seed=0", 0.1), summary("a seed=1", 0.01)]
    assert "It lost" not in verdict(mixed)  # one of the two does not say so


def test_a_benchmark_is_worse_only_where_every_seed_says_so() -> None:
    sure, unsure = (
        with_benchmarks(summary(f"a seed={i}", 0.01), c=benchmark(lost, 0.05)) for i, lost in enumerate((0.2, 0.01))
    )
    assert "It became worse at c (90.0 → 70.0 %)." in verdict([sure, sure.model_copy(update={"name": "a seed=2"})])
    assert "became worse" not in verdict([sure, unsure])
    assert "No benchmark shows a loss in every seed; with 100 documents" in verdict([sure, unsure])


def test_the_headline_is_two_sentences_at_most() -> None:
    cases = [[summary("a", lost)] for lost in (0.05, 0.01, -0.05)]
    for losses in ({"a": 0.5, "b": 0.1, "c": 0.3}, {"a": 0.1, "b": 0.1}):
        cases.append([summary(name, lost) for name, lost in losses.items()])
    for case in cases:
        said = compared(case)
        assert len(said) == 2 and remarks(case, paired(case)) == [ONE_SEED] * (len(case) > 1)
        assert [len(re.findall(r"[.!?](?= [A-Z“]|$)", sentence)) for sentence in said] == [1, 1]


def test_where_no_loss_shows_the_power_of_every_unit_is_said() -> None:
    loss = benchmark(0.0, 0.05) | {"forgetting": figure(0.0, 0.05, "nats/token"), "chance_corrected": None}
    alone = summary("a", 0.0).model_copy(update={"mean_forgetting": None})
    assert "losses under 0.1 nats/token may stay" in verdict([with_benchmarks(alone, wiki=loss)])
    shares = {"b": benchmark(0.0, 0.05), "c": benchmark(0.0, 0.05, 0.2)}
    assert "losses under 20 points may stay" in verdict([with_benchmarks(alone, **shares)])
    mixed = with_benchmarks(alone, **shares, wiki=loss | {"num_documents": 50})
    assert "with 50 to 100 documents each, losses under 20 points or under 0.1 nats/token may stay" in verdict([mixed])
    still = with_benchmarks(alone, **shares, d=benchmark(0.0, 0.0, None), e=benchmark(0.0, 0.0, 3.5))
    assert "losses under 100 points or of unknown size at d may stay invisible" in verdict([still])


def test_detectable_drop_shrinks_with_more_benchmarks() -> None:
    one = summary("a", 0.0)
    (alone,) = one.benchmarks.values()
    four = one.model_copy(update={"benchmarks": {str(i): alone for i in range(4)}})
    of_one = detectable_mean(forgotten_of(one))
    assert of_one == pytest.approx(
        2 * 0.0553 * 2.8016 / 1.96, rel=1e-3
    )  # from the interval, twice as wide above chance
    assert detectable_mean(forgotten_of(four)) == pytest.approx(of_one / 2)
    unknown = one.model_copy(update={"benchmarks": {"b": benchmark(0.0, 0.1, None)}})
    assert detectable_mean(forgotten_of(unknown)) == pytest.approx(0.2 * 2.8 / 1.96, rel=1e-3)
    still = one.model_copy(update={"benchmarks": {"b": benchmark(0.0, 0.0, None)}})
    assert detectable_mean(forgotten_of(still)) is None  # all documents alike say nothing of the scatter


def test_no_clause_of_the_first_sentence_is_cut_off() -> None:
    three = [
        summary("a", 0.3, gain=0.0, kl=0.5),
        summary("b", 0.01, gain=0.0, kl=0.1),
        summary("c", 0.01, gain=0.0, kl=0.1),
    ]
    said = compared(three)[0]
    parts = [
        "not shown to have learned",
        "not shown to differ in learning",
        "moved a fifth",
        "lost less",
        "distinguishable",
    ]
    assert [part for part in parts if part not in said] == [] and " more." not in said


def test_a_divergence_in_chats_of_too_few_answers_says_so() -> None:
    """Of one chat of 16 it stood in the first sentence like any other."""
    one = summary("a", 0.1)
    few, many = (
        one.model_copy(update={"chat_kl": {"value": 0.03, "low": low, "high": high, "unit": "nats/token"}})
        for low, high in ((None, None), (0.02, 0.04))
    )
    assert "and 0.0300 in chats (too few answers for an interval)" in two_sentences([few])[0]
    assert "and 0.0300 [0.0200, 0.0400] in chats" in two_sentences([many])[0]


def test_five_seeds_find_together_what_not_each_of_them_finds() -> None:
    """A mean loss of 9.5 points was "no loss in every seed", as one of five seeds had lost 1.5."""
    losses = (0.105, 0.015, 0.14, 0.105, 0.11)

    def repeats(losses: tuple[float, ...]) -> list[Summary]:
        return [
            with_benchmarks(summary(f"a seed={seed}", lost), facts=benchmark(lost, 0.06))
            for seed, lost in enumerate(losses)
        ]

    assert "became worse at facts" in verdict(repeats(losses))
    assert "became worse at facts" not in verdict(repeats(losses[:4]))
    unsettled = verdict(repeats((0.02, -0.03, 0.01, -0.02, 0.03)))
    assert "o benchmark shows a loss over the seeds" in unsettled
