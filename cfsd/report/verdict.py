"""The verdict: two short sentences on what was learned and lost, a line per budget, warnings; the same everywhere.

Whether two variants differ is decided by `cfsd.report.comparisons`, paired; where no difference is found, none is ruled
out, and the words say so.
"""

import math
from collections.abc import Iterable, Iterator
from statistics import fmean
from typing import Any, NamedTuple

from cfsd.generate.spec import UNPROMPTED
from cfsd.model.folder import ROUNDED_AWAY
from cfsd.report.compared import NOTHING, Compared, Comparisons
from cfsd.report.measures import figure_of, least_of
from cfsd.report.summary import Fig, Summary
from cfsd.report.table import (
    POINTS,
    by_variant,
    change_of_score,
    forgotten_of,
    modes_of,
    number,
    shown,
    side_of,
    unit_called,
    unit_of,
    variant_of,
)
from cfsd.statistics import seeds
from cfsd.statistics.differences import LEVEL, over_many_seeds
from cfsd.statistics.discoveries import change_of, false_discovery
from cfsd.statistics.figures import Figure
from cfsd.statistics.forgetting import BenchmarkForgetting

UNMOVED = 1e-6  # nats per token; float32 logits give as much for a model against itself
ENOUGH = 0.95  # of the largest target gain
ENOUGH_STEPS = 50  # for lambda to be steered in: in 31 the divergence ended far above the budget, in 62 near it
ONE_SEED = (
    f"Each variant was trained once: a difference is one of these models, and two trainings of one recipe differ, too, "
    f"as a rule; {seeds.FEWEST} seeds compare the recipes (--seeds {seeds.FEWEST})."
)
FEW_SEEDS = (
    f"Fewer than {seeds.FEWEST} seeds give no interval over seeds: brackets in the verdict hold the intervals of all "
    "seeds, so that what is said of a variant, or of its difference from another one, holds for each of its seeds."
)
MANY_SEEDS = f"Brackets in the verdict are over seeds. {seeds.DEFINITION}"

# What is said by the sign of a figure, or of a difference; None: no interval is known.
LEARNED = {
    1: "learned the target (its held-out loss fell by {} nats per token)",
    0: "is not shown to have learned the target (gain {} nats per token)",
    -1: "became worse at the target (gain {} nats per token)",
    None: "has too few held-out rows to say whether it learned the target (gain {} nats per token)",
}
LEARNED_THAN = {
    1: "learned more than {} (difference {} nats per token)",
    0: "is not shown to differ in learning from {} (difference {} nats per token)",
    -1: "learned less than {} (difference {} nats per token)",
    None: "has too few held-out rows to say whether it learned more or less than {} (difference {} nats per token)",
}
HELD_OUT_LOSS = {  # of one that is not shown to have learned, by the sign of its gain less the other one's
    1: "has a lower held-out loss than {} (difference in gain {} nats per token)",
    0: LEARNED_THAN[0],
    -1: "has a higher held-out loss than {} (difference in gain {} nats per token)",
    None: LEARNED_THAN[None],
}
MOVED = {
    1: "moved {} as far from the base",
    0: "is not shown to have moved more or less far from the base",
    -1: "moved {} as far from the base",
    None: "may have moved {} as far from the base",
}
LOST_THAN = {1: "lost more on benchmarks", -1: "lost less on benchmarks"}
LOST = {
    1: "lost {} points above chance {}",
    0: "",
    -1: "lost {} points above chance {}, which is a gain",
    None: "has too few documents to say whether it lost anything ({} points above chance {})",
}
OUTCOMES = {
    "kept": "kept",
    "exceeded": "exceeded",
    "cannot tell": "kept or exceeded (the probe's interval is too wide to say)",
}
COMPARED = ("target_gain", "probe_kl", "chat_kl", "mean_forgetting")
PARTS = ("half", "a third", "a quarter", "a fifth", "a sixth", "a seventh", "an eighth", "a ninth", "a tenth")
MOST_ROWS = 100  # times as many, that are still proposed
HARDLY = " with hardly any rehearsal"


class Variant(NamedTuple):
    """One variant: its repeats, which differ in their seed, and its figures over them."""

    name: str
    repeats: list[Summary]
    gain: Fig | None
    moved: Fig | None
    in_chats: Fig | None
    lost: Fig | None


def variants_of(summaries: list[Summary]) -> list[Variant]:
    """Return the variants, in the order of their first repeats."""
    repeats = by_variant((summary.name, summary) for summary in summaries)
    return [Variant(name, own, *(over_seeds(own, measure) for measure in COMPARED)) for name, own in repeats.items()]


def over_seeds(repeats: list[Summary], name: str) -> Fig | None:
    """Return a figure over the repeats, as `joined_figure` does; None where one of them has none."""
    figures = [Figure.model_validate(figure) for s in repeats if (figure := figure_of(s, name)) is not None]
    return joined_figure(figures, least_of(name)) if figures and len(figures) == len(repeats) else None


def joined_figure(figures: list[Figure], least: float = -math.inf) -> Fig:
    """Return one figure over those of seeds; of fewer than FEWEST seeds, its ends hold those of every seed.

    `least` is the smallest value that is possible.
    """
    mean = figures[0] if len(figures) == 1 else seeds.over_seeds(figures)
    ends = [(f.low, f.high) for f in figures if f.low is not None and f.high is not None]
    if 1 < len(figures) < seeds.FEWEST and len(ends) == len(figures):
        mean = mean.model_copy(update={"low": min(low for low, _ in ends), "high": max(high for _, high in ends)})
    return mean.within(least, math.inf).model_dump()


def verdict(summaries: list[Summary], comparisons: Comparisons = NOTHING) -> str:
    """Return the two sentences and the remarks as one text."""
    return " ".join([*two_sentences(summaries, comparisons), *remarks(summaries, comparisons)])


def two_sentences(summaries: list[Summary], comparisons: Comparisons = NOTHING) -> list[str]:
    """Return what was learned and how far the model moved, and what benchmarks lost, within what the data allow.

    Of several variants, the `best` is compared with the first other one of the same base and target.
    Fewer than two sentences where there is nothing to say.
    """
    variants = variants_of(summaries)
    one = best(variants, comparisons)
    others = _others(one, variants, comparisons)
    clauses = list(_compared(comparisons, one, *others) if others else _alone(one))
    name = f"Of {len(variants)} variants, “{one.name}”" if len(others) > 1 else f"“{one.name}”"
    first = [f"{name} {joined(clauses)}."] if clauses else []
    return [*first, *_benchmarks(variants, "it" if first else name)]


def _others(one: Variant, variants: list[Variant], comparisons: Comparisons) -> list[Variant]:
    """Return the other variants, first those that `one` was compared with."""

    def lacks(other: Variant) -> bool:
        return not any(comparisons.of(one.name, other.name, measure) for measure in COMPARED)

    return sorted((v for v in variants if v is not one), key=lacks)


def best(variants: list[Variant], comparisons: Comparisons) -> Variant:
    """Return the variant that moved least among those that learned enough.

    Those are the one that learned most, those not found to have learned less, and those with ENOUGH of its gain:
    pairing finds differences that nobody would choose by.
    """
    most = max((v for v in variants if v.gain), key=lambda v: _value(v.gain), default=None)
    learned = [v for v in variants if most is None or _learned_enough(comparisons, v, most)]
    return min(learned, key=lambda v: (_value(v.moved), _value(v.lost), -_value(v.gain)))


def _learned_enough(comparisons: Comparisons, one: Variant, most: Variant) -> bool:
    if one.gain is None:
        return False
    is_less = comparisons.sign(one.name, most.name, "target_gain") == -1
    return not is_less or _value(one.gain) >= ENOUGH * _value(most.gain) > 0


def _value(figure: Fig | None) -> float:
    return math.inf if figure is None else float(figure["value"])


def _alone(variant: Variant) -> Iterator[str]:
    if gain := variant.gain:
        yield LEARNED[side_of(gain)].format(shown(gain))
    if moved := variant.moved:
        by = "did not move" if moved["value"] <= UNMOVED else f"moved {shown(moved)} nats per token"
        yield f"{by} from the base{_in_chats(variant.in_chats)}"


def _in_chats(moved: Fig | None) -> str:
    if moved is None:
        return ""
    few = " (too few answers for an interval)" if moved["low"] is None else ""
    return f" and {shown(moved)} in chats{few}"


def _compared(comparisons: Comparisons, one: Variant, other: Variant, *further: Variant) -> Iterator[str]:
    """Yield what `one` is to `other`, and which of the further variants are not distinguishable from it."""
    named = f"“{other.name}”"
    gain, moved, in_chats, lost = (comparisons.of(one.name, other.name, measure) for measure in COMPARED)
    if gain:
        words = LEARNED_THAN
        if one.gain and (side := side_of(one.gain)) in (0, -1):
            yield LEARNED[side].format(shown(one.gain))
            words = HELD_OUT_LOSS
        yield words[gain.sign()].format(named, shown(gain.figure()))
    if moved and one.moved and other.moved:
        unmoved = min(one.moved["value"], other.moved["value"]) <= UNMOVED
        against = "" if gain else f" {'of' if unmoved else 'than' if moved.sign() == 0 else 'as'} {named}"
        yield f"{_distance(one.moved, other.moved, moved)}{against} (difference {shown(moved.figure())} nats per token)"
    if in_chats and one.in_chats and other.in_chats:
        by = _distance(one.in_chats, other.in_chats, in_chats)
        yield f"in chats {by} (difference {shown(in_chats.figure())} nats per token)"
    if lost and lost.sign():
        yield f"{LOST_THAN[lost.sign() or 1]} ({shown(lost.figure(), POINTS)} points)"
    alike = [v.name for v in further if _alike(comparisons, one, v)]
    if alike and (gain or moved):
        yield f"is not distinguishable from {quoted(alike)}"


def _distance(one: Fig, other: Fig, moved: Compared) -> str:
    if min(one["value"], other["value"]) <= UNMOVED:
        return f"moved {number(one['value'])} nats per token from the base, against {number(other['value'])}"
    ratio = one["value"] / other["value"]
    part = round(1 / ratio)
    words = f"{number(ratio)} times"
    if part > 1 and abs(part * ratio - 1) < 0.1:
        words = PARTS[part - 2] if part < len(PARTS) + 2 else f"1/{float(f'{part:.3g}'):g}"
    return MOVED[moved.sign()].format(words)


def _alike(comparisons: Comparisons, one: Variant, other: Variant) -> bool:
    found = [entry for entry in comparisons.entries if {entry.one, entry.other} == {one.name, other.name}]
    return any(entry.measure in COMPARED for entry in found) and not any(entry.sign() for entry in found)


def _benchmarks(variants: list[Variant], subject: str) -> list[str]:
    """Return the sentence on benchmarks: who lost what, and where no loss shows, how large a one may be invisible."""
    changes = {v.name: change for v in variants if (change := _change(v))}
    rest = [v for v in variants if v.repeats[0].benchmarks and v.name not in changes]
    said = [f"{subject if len(variants) == 1 else f'“{name}”'} {change}" for name, change in changes.items()]
    said = said if len(said) <= 4 else [*said[:3], f"benchmarks of {len(said) - 3} more changed"]
    everyone = {1: "", 2: " for either"}.get(len(variants), " for any variant")
    who = everyone if len(rest) == len(variants) else f" for {quoted(v.name for v in rest)}" if rest else ""
    unsettled = [e for v in variants for s in v.repeats for e in forgotten_of(s) if change_of(e) == "unsettled"]
    if rest or unsettled:
        most = max(len(v.repeats) for v in rest or variants)
        seeded = "" if most == 1 else " in every seed" if most < seeds.FEWEST else " over the seeds"
        but = "" if rest else "other " if any(_surely_worse(v.repeats) for v in variants) else "single "
        said.append(f"no {but}benchmark shows a loss{seeded}{who}")
    if unsettled:
        said.append(_power(unsettled))
    text = "; ".join(said)
    return [f"{text[:1].upper()}{text[1:]}."] if text else []


def _change(variant: Variant) -> str:
    average, worse = "", _surely_worse(variant.repeats)
    if variant.lost:
        count = sum(entry.chance_corrected is not None for entry in forgotten_of(variant.repeats[0]))
        over = f"on average over {count} benchmarks" if count > 1 else "on 1 benchmark"
        average = LOST[side_of(variant.lost)].format(shown(variant.lost, POINTS), over)
    return " and ".join(part for part in (average, f"became worse at {listed(worse)}" if worse else "") if part)


def _surely_worse(summaries: list[Summary]) -> list[str]:
    """Return the benchmarks that are found worse under false-discovery control, with their scores.

    Of few seeds each must find it; of FEWEST or more all count together, as each by itself would find less than one.
    """
    by_seed = [{e.benchmark: e for e in forgotten_of(summary)} for summary in summaries]
    if len(summaries) >= seeds.FEWEST:
        worse = _worse_together(by_seed)
    else:
        worse = set.intersection(*({n for n, e in own.items() if change_of(e) == "worse"} for own in by_seed))
    named = [name for name in summaries[0].benchmarks if name in worse]
    means = {name: _mean_scores([summary.benchmarks[name] for summary in summaries]) for name in named}
    return [f"{name} ({change_of_score(result)} {unit_of(result).score})" for name, result in means.items()]


def _worse_together(by_seed: list[dict[str, BenchmarkForgetting]]) -> set[str]:
    shared = [name for name in by_seed[0] if all(name in own for own in by_seed)]
    found = {name: over_many_seeds([own[name].forgetting for own in by_seed]) for name in shared}
    known = {name: difference.p_value for name, difference in found.items() if difference.p_value is not None}
    adjusted = dict(zip(known, false_discovery(list(known.values())), strict=True))
    return {name for name, q in adjusted.items() if q <= LEVEL and found[name].figure.value > 0}


def _mean_scores(repeats: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a benchmark's result with the means of its scores over the repeats."""
    return repeats[0] | {role: fmean(result[role] for result in repeats) for role in ("base", "tuned")}


def _power(entries: list[BenchmarkForgetting]) -> str:
    """Return how large a loss may stay invisible: the largest over the benchmarks in which no change was found."""
    counts = [entry.num_documents for entry in entries]
    documents = f"{min(counts):,}" + (f" to {max(counts):,}" if max(counts) > min(counts) else "")
    largest: dict[str, float] = {}
    for entry in entries:
        _, unit, scale = unit_called(entry.forgetting.unit)
        if entry.detectable is not None:
            largest[unit] = max(largest.get(unit, 0), min(entry.detectable * scale, POINTS if scale > 1 else math.inf))
    sizes = [f"under {float(f'{drop:.2g}'):g} {unit}" for unit, drop in largest.items()]
    if unknown := [entry.benchmark for entry in entries if entry.detectable is None]:
        sizes.append(f"of unknown size at {listed(list(dict.fromkeys(unknown)))}")
    return f"with {documents} documents each, losses {' or '.join(sizes)} may stay invisible"


def remarks(summaries: list[Summary], comparisons: Comparisons = NOTHING) -> list[str]:
    """Return what stands beneath the two sentences: a line per budget, how variants were compared, over seeds."""
    variants = variants_of(summaries)
    compared = [*_unequal(variants, comparisons), *_of_comparisons(variants, comparisons)]
    return [*budget_lines(summaries), *compared, *_of_seeds(variants, comparisons), *_equal_repeats(variants)]


def _of_seeds(variants: list[Variant], comparisons: Comparisons) -> Iterator[str]:
    """Yield what the number of seeds means for what was said."""
    if repeats := {len(v.repeats) for v in variants} - {1}:
        yield MANY_SEEDS if min(repeats) >= seeds.FEWEST else FEW_SEEDS
    elif comparisons.entries:
        yield ONE_SEED


def _equal_repeats(variants: list[Variant]) -> Iterator[str]:
    """Yield which variants have repeats that are one and the same model, over which no interval means anything."""
    figures = {v.name: [[figure_of(s, measure) for measure in COMPARED] for s in v.repeats] for v in variants}
    equal = [name for name, (first, *rest) in figures.items() if any(first) and rest and all(r == first for r in rest)]
    if equal:
        yield (
            f"The seeds of {quoted(equal)} gave the same figures to the last digit: what they vary changes nothing "
            "there, so that intervals over seeds say nothing about other seeds."
        )


def _unequal(variants: list[Variant], comparisons: Comparisons) -> Iterator[str]:
    """Yield that the two variants of the first sentence learned unequally, so that their losses are no fair match."""
    one = best(variants, comparisons)
    other = next(iter(_others(one, variants, comparisons)), one)
    gain = comparisons.of(one.name, other.name, "target_gain")
    if gain and gain.sign():
        gains = _value(one.gain), _value(other.gain)
        part = f" (they differ by {_share(gain.value, max(gains))} % of the larger gain)" if min(gains) > 0 else ""
        yield (
            f"“{one.name}” and “{other.name}” did not learn equally{part}: what they lost is not compared at equal "
            "gain."
        )


def _share(difference: float, of: float) -> str:
    return number(abs(difference) / of * POINTS)


def _of_comparisons(variants: list[Variant], comparisons: Comparisons) -> Iterator[str]:
    """Yield which pairs could not be compared, or not wholly, or not paired."""
    alone = [v.name for v in variants if not any(v.name in (c.one, c.other) for c in comparisons.entries)]
    if alone and len(variants) > 1:
        others = "the other variants" if len(alone) < len(variants) else "each other"
        were = "was" if len(alone) == 1 else "were"
        yield f"{quoted(alone)} {were} not compared with {others}: another base or target, or nothing measured on both."
    lost, pairs = {v.name for v in variants if v.lost}, {(c.one, c.other) for c in comparisons.entries}
    if any({*pair} <= lost and not comparisons.of(*pair, "mean_forgetting") for pair in pairs):
        yield "Variants with other benchmarks are not compared in mean forgetting, which is over others then."
    unpaired = dict.fromkeys(c.measure for c in comparisons.entries if not c.paired)
    if unpaired:
        yield (
            f"Some variants were measured on other units: their differences in {listed(list(unpaired))} are not paired "
            "but from their two intervals, which finds less."
        )


def budget_lines(summaries: list[Summary]) -> list[str]:
    """Return a line per variant that had a budget; the outcomes of its repeats are counted."""
    budgets = {v.name: [s.budget for s in v.repeats if s.budget] for v in variants_of(summaries)}
    return [f"{'; '.join(_budget(name, own))}." for name, own in budgets.items() if own]


def _budget(name: str, budgets: list[dict[str, Any]]) -> Iterator[str]:
    modes, of = list(modes_of(budgets[0])), f"Budget of “{name}”, "
    for mode in modes:
        yield from _of_mode(of + ("" if modes == [UNPROMPTED] else f"{mode}, "), [modes_of(b)[mode] for b in budgets])
        of = ""
    if len(budgets) > 1:
        return
    (budget,) = budgets
    if budget["final_weight"] is not None:
        yield f"λ was {number(budget['final_weight'])} at the end"
    before = {mode: own.get("ratio_before_merging") or 0 for mode, own in modes_of(budget).items()}
    if max(before.values()) > 1:
        was = joined([f"{number(ratio * POINTS)} %" for ratio in before.values()])
        what = "it" if len(before) == 1 else "them"
        yield f"merging with the base at alpha {number(budget['alpha'])} brought {what} down from {was}"
    if cost := budget["target_gain_cost"]:
        nats, gain = f"{shown(cost)} nats per token", f"the gain of “{budget['plain']}”"
        sure = side_of(cost) == 1
        yield f"it gave up {nats} of {gain}" if sure else f"it is not shown to have given up any of {gain} ({nats})"


def _of_mode(whose: str, budgets: list[dict[str, Any]]) -> Iterator[str]:
    """Yield what became of one mode's budget; the outcomes of repeats are counted."""
    outcomes, several = [_outcome(budget) for budget in budgets], f" of {len(budgets)} seeds"
    counts = {words: outcomes.count(words) for words in dict.fromkeys(outcomes)}
    said = [f"{words} in {count}{several}" if len(budgets) > 1 else words for words, count in counts.items()]
    yield f"{whose}{number(budgets[0]['nats'])} nats per token: {', '.join(said)}"
    if len(budgets) > 1:
        return
    (budget,) = budgets
    if budget["ratio"]:
        yield f"{shown(budget['ratio'], POINTS)} % of it was used"
    if needs := budget["needs"]:
        more = f"about {math.ceil(max(2.0, needs))} times as many probe.rows would tell"
        yield more if needs <= MOST_ROWS else "it lies at the limit, so that no larger probe.rows would soon tell"


def _outcome(budget: dict[str, Any]) -> str:
    """Return the outcome in words, with what is known of how much of the budget was used."""
    words = OUTCOMES[budget["outcome"]]
    if budget["outcome"] != "kept":
        return words
    return f"{words} and used up" if budget["tight"] else words if budget["binding"] else f"{words}{HARDLY}"


def warnings(summaries: list[Summary]) -> list[str]:
    """Return a line per doubtful score, corpus that is not the base's own, training cut short or steered too late."""
    corpora: dict[str, dict[str, None]] = {}
    for summary in summaries:
        for warning in summary.corpus_warnings:
            corpora.setdefault(warning, {})[variant_of(summary.name)] = None
    lines = list(dict.fromkeys(doubt for summary in summaries for doubt in summary.evaluation_warnings))
    lines += [f"the corpus of {quoted(names)} is {warning}" for warning, names in corpora.items()]
    for name, training, budget in ((s.name, s.training or {}, s.budget or {}) for s in summaries):
        if (step := training.get("stopped_at_step")) is not None:
            lines.append(f"the training of “{name}” was stopped at step {step} (watch.stop_above)")
        if (share := training.get("rounding_undid", 0.0)) > ROUNDED_AWAY:
            lines.append(
                f"the number format takes back {number(share * POINTS)} % of what the training of “{name}” changed in "
                "the weights; what is left was measured (raise train.learning_rate, or convert the base to float32)"
            )
        steered = budget.get("divergence_estimate") is not None  # with merge.budget alone it is None
        merged = (budget.get("ratio_before_merging") or math.inf) > 1
        if steered and merged and training.get("steps", ENOUGH_STEPS) < ENOUGH_STEPS:
            lines.append(
                f"λ of “{name}” had only {training['steps']} steps to be steered in, and merging had to keep the "
                f"budget; with {ENOUGH_STEPS} or more steps less is given up (lower mix.target_rows and "
                "mix.rehearsal_tokens, or raise train.epochs)"
            )
    return [f"Warning: {line}." for line in lines]


def quoted(names: Iterable[str]) -> str:
    """Return the names in quotes, as a list in a sentence."""
    return listed([f"“{name}”" for name in names])


def listed(names: list[str]) -> str:
    """Return `names` as a list in a sentence; of more than four, how many more."""
    return joined(names if len(names) <= 4 else [*names[:3], f"{len(names) - 3} more"])


def joined(parts: list[str]) -> str:
    """Return `parts`, at least one, as an enumeration."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last
