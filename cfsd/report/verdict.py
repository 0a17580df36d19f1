"""The verdict: what the figures of many variants say, in two sentences, and what must be said beside them."""

import math
from typing import Any

from rich.console import Console
from rich.text import Text

from cfsd.report.budget import budget_sentences
from cfsd.report.comparisons import (
    comparisons,
    listed,
    over_seeds,
    power_over,
    quoted,
    surely_worse,
    variants_of,
    where,
)
from cfsd.report.summary import Summary
from cfsd.report.table import POINTS, forgotten_of, number, shown, sign_of, variant_of
from cfsd.report.terminal import print_table
from cfsd.statistics import seeds
from cfsd.statistics.discoveries import power_of
from cfsd.statistics.figures import FRACTION
from cfsd.statistics.forgetting import BenchmarkForgetting

UNMOVED = 1e-6  # nats per token; float32 logits give as much for a model against itself
ENOUGH_STEPS = 50  # for lambda to be steered in: in 31 the divergence ended far above the budget, in 62 near it
FEW_SEEDS = (
    f"Fewer than {seeds.FEWEST} seeds give no interval over seeds: brackets in the verdict hold the intervals of all "
    "seeds, so that what is said of a variant holds for each of its seeds."
)
MANY_SEEDS = f"Brackets in the verdict are over seeds. {seeds.DEFINITION}"


def verdict(summaries: list[Summary]) -> str:
    """Return the two sentences and the remarks as one text."""
    return " ".join([*two_sentences(summaries), *remarks(summaries)])


def two_sentences(summaries: list[Summary]) -> list[str]:
    """Return what was learned and what was forgotten, a sentence each, within what the intervals allow.

    Repeats of a variant count as one: `cfsd.statistics.seeds`. Fewer than two where there is nothing to say.
    """
    variants = variants_of(summaries)
    if len(variants) > 1:
        return comparisons(variants)[:2]
    learned = _learned(summaries)
    subject = "It" if learned else f"“{variant_of(summaries[0].name)}”"
    return [sentence for sentence in (learned, _cost(summaries, subject)) if sentence]


def remarks(summaries: list[Summary]) -> list[str]:
    """Return what stands beneath the two sentences: further comparisons, budgets, what is known of seeds."""
    variants = variants_of(summaries)
    further = [*comparisons(variants)[2:], *_worse_at(variants)] if len(variants) > 1 else []
    repeats = {len(found) for found in variants.values()} - {1}
    over = [MANY_SEEDS if min(repeats) >= seeds.FEWEST else FEW_SEEDS] if repeats else []
    return [*further, *budget_sentences(summaries), *over]


def _worse_at(variants: dict[str, list[Summary]]) -> list[str]:
    """Return a line on the benchmarks that by themselves became worse, variant by variant."""
    worse = {name: found for name, repeats in variants.items() if (found := surely_worse(repeats))}
    said = [f"“{name}” at {listed(found)}" for name, found in worse.items()]
    return [f"Worse at single benchmarks: {'; '.join(said)}."] if said else []


def warnings(summaries: list[Summary]) -> list[str]:
    """Return a line per way in which a corpus is not the base's own law, training cut short, or doubtful score."""
    found: dict[str, dict[str, None]] = {}
    for summary in summaries:
        for warning in summary.corpus_warnings:
            found.setdefault(warning, {})[variant_of(summary.name)] = None
    stopped = [(s.name, step) for s in summaries if (step := (s.training or {}).get("stopped_at_step")) is not None]
    hurried = [(s.name, s.training["steps"]) for s in summaries if s.training and _too_late(s.budget, s.training)]
    doubts = dict.fromkeys(doubt for summary in summaries for doubt in summary.evaluation_warnings)
    return [
        *(f"Warning: {doubt}." for doubt in doubts),
        *(f"Warning: the corpus of {quoted(names)} is {warning}." for warning, names in found.items()),
        *(
            f"Warning: the training of “{name}” was stopped at step {step} (watch.stop_above)."
            for name, step in stopped
        ),
        *(
            f"Warning: λ of “{name}” had only {steps} steps to be steered in, and merging had to keep the budget; with "
            f"{ENOUGH_STEPS} or more steps less is given up (lower mix.target_rows and mix.rehearsal_tokens, or raise "
            "train.epochs)."
            for name, steps in hurried
        ),
    ]


def _too_late(budget: dict[str, Any] | None, training: dict[str, Any]) -> bool:
    if budget is None or budget["divergence_estimate"] is None:  # with merge.budget alone nothing was steered
        return False
    if (budget.get("ratio_before_merging") or math.inf) <= 1:
        return False
    return int(training.get("steps", ENOUGH_STEPS)) < ENOUGH_STEPS


def _learned(summaries: list[Summary]) -> str:
    gain, name = over_seeds(summaries, "target_gain"), variant_of(summaries[0].name)
    if gain is None:
        return ""
    by = f"{shown(gain)} nats per token"
    if gain["low"] is None:
        return f"Held-out rows are too few to say whether “{name}” learned the target (gain {by})."
    if sign_of(gain) <= 0:
        found = "became worse at the target itself" if sign_of(gain) else "was not found to have learned the target"
        return f"“{name}” {found}: the gain in held-out loss is {by}."
    shares = [[s.target[f"{role}_accuracy"] for s in summaries] for role in ("base", "tuned")]
    exact = [number(POINTS * sum(found) / len(found)) for found in shares]
    return (
        f"“{name}” became better at the target: its loss on held-out rows fell by {by}, "
        f"and the rows it answers exactly went from {exact[0]} to {exact[1]} %."
    )


def _cost(summaries: list[Summary], subject: str) -> str:
    """Return the sentence on what was forgotten: by the benchmarks, and by how far the predictions moved."""
    forgot, moved = _forgot(summaries, subject), _moved(summaries)
    said = "; ".join(part for part in (forgot, moved) if part)
    return f"{said[:1].upper()}{said[1:]}." if said else ""


def _forgot(summaries: list[Summary], subject: str) -> str:
    mean, entries = over_seeds(summaries, "mean_forgetting"), forgotten_of(summaries[0])
    if not entries:
        return ""
    averaged = [entry for entry in entries if mean is None or entry.chance_corrected]
    over = f"{len(averaged)} benchmark{'s' if len(averaged) > 1 else ''}"
    worse = surely_worse(summaries)
    if mean is None:
        unfound = f"no forgetting was found on {over}{_each(entries)}"
        return f"{subject} became worse at {listed(worse)}" if worse else unfound
    points = f"{shown(mean, POINTS)} points on average over {over}"
    alone = f"{',' if sign_of(mean) > 0 else ', but'} worse by itself: {listed(worse)}" if worse else ""
    if mean["low"] is None:
        return f"documents are too few to say whether anything was forgotten: {points} were lost{alone}"
    if sign_of(mean) > 0:
        return f"{subject} forgot: it lost {points}{alone}"
    if sign_of(mean) < 0:
        return f"{subject} forgot nothing on the whole: it lost {points}, so it gained{alone}"
    return f"no forgetting was found on the whole: it lost {points}{where(power_over(summaries))}{alone}"


def _each(entries: list[BenchmarkForgetting]) -> str:
    """Return the power of benchmarks without a mean: of the least sharp of those that count documents."""
    shares = [entry for entry in entries if entry.forgetting.unit == FRACTION and entry.detectable is not None]
    if len(entries) == 1:
        return where(power_of(entries[0]))
    if len(shares) < len(entries):
        return "".join(f"{', ' if i else ' ('}{e.benchmark}: {power_of(e)}" for i, e in enumerate(entries[:3])) + ")"
    return where(power_of(max(shares, key=lambda entry: entry.detectable or 0)).replace("would", "on each would"))


def _moved(summaries: list[Summary]) -> str:
    kl = over_seeds(summaries, "probe_kl")
    if kl is None:
        return ""
    moved = "did not move" if kl["value"] <= UNMOVED else f"moved by {shown(kl)} nats per token"
    return f"on text that the base model writes unprompted, the tuned model's predictions {moved}"


def print_summary(summaries: list[Summary], console: "Console") -> None:
    """Print the table and the verdict; on a narrow console in parts, with intervals on lines of their own."""
    print_table(summaries, console)
    for said in (" ".join(two_sentences(summaries)), *remarks(summaries), *warnings(summaries)):
        console.print(Text(said))
