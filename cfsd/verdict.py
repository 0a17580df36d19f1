"""The verdict: what the figures of many variants say, in about two sentences."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from cfsd.budget import budget_sentences
from cfsd.summary import Summary
from cfsd.table import POINTS, Fig, number, print_table, shown, sign_of, unit_of, variant_of

if TYPE_CHECKING:
    from rich.console import Console

POWER = 2.8 / 1.96  # from half a 95 % interval to the change found with 80 % power at 5 %
UNMOVED = 1e-6  # nats per token; float32 logits give as much for a model against itself


class Words(NamedTuple):
    """How variants are compared by one figure; `up` is 1 where more is better, else -1."""

    up: int
    did: str
    field: str
    most: str
    unit: str
    factor: float = 1


COMPARED = {
    "mean_forgetting": Words(-1, "forgot less", "what they forgot", "lost least", "points on average", POINTS),
    "probe_kl": Words(
        -1, "moved less from the base model", "how far they moved from the base model", "moved least", "nats per token"
    ),
    "target_gain": Words(
        1, "learned more of the target", "what they gained on the target", "gained most", "nats per token"
    ),
}


def verdict(summaries: list[Summary]) -> str:
    """Return what was learned and forgotten in two or three sentences, within what the intervals allow.

    Repeats of a variant count as one, whose interval holds all of theirs.
    """
    variants: dict[str, list[Summary]] = {}
    for summary in summaries:
        variants.setdefault(variant_of(summary.name), []).append(summary)
    if len(variants) == 1:
        learned = _learned(summaries)
        subject = "It" if learned else f"“{variant_of(summaries[0].name)}”"
        said = [learned, _forgot(summaries, subject), _moved(summaries)]
    else:
        # what is sure comes first
        compared = [_compared(variants, figure) for figure in COMPARED]
        said = [sentence for _, sentence in sorted(compared, key=lambda found: not found[0])]
    return " ".join(sentence for sentence in [*said, *budget_sentences(summaries)] if sentence)


def warnings(summaries: list[Summary]) -> list[str]:
    """Return a line per way in which a corpus is not the base model's own law, and per training cut short."""
    found: dict[str, dict[str, None]] = {}
    for summary in summaries:
        for warning in summary.corpus_warnings:
            found.setdefault(warning, {})[variant_of(summary.name)] = None
    stopped = [(s.name, step) for s in summaries if (step := (s.training or {}).get("stopped_at_step")) is not None]
    return [
        *(f"Warning: the corpus of {_quoted(names)} is {warning}." for warning, names in found.items()),
        *(
            f"Warning: the training of “{name}” was stopped at step {step} (watch.stop_above)."
            for name, step in stopped
        ),
    ]


def _over_seeds(repeats: list[Summary], name: str) -> Fig | None:
    figures = [figure for s in repeats if (figure := getattr(s, name)) is not None]
    if not figures or len(figures) < len(repeats):
        return None
    lows, highs = [f["low"] for f in figures], [f["high"] for f in figures]
    value = sum(f["value"] for f in figures) / len(figures)
    whole = None not in lows
    return {"value": value, "low": min(lows) if whole else None, "high": max(highs) if whole else None}


def _learned(summaries: list[Summary]) -> str:
    gain, target, name = _over_seeds(summaries, "target_gain"), summaries[0].target, summaries[0].name
    if gain is None:
        return ""
    by = f"{shown(gain)} nats per token"
    if gain["low"] is None:
        return f"Held-out rows are too few to say whether “{variant_of(name)}” learned the target (gain {by})."
    if sign_of(gain) <= 0:
        found = "became worse at the target itself" if sign_of(gain) else "was not found to have learned the target"
        return f"“{variant_of(name)}” {found}: the gain in held-out loss is {by}."
    exact = [number(target[f"{role}_accuracy"] * POINTS) for role in ("base", "tuned")]
    return (
        f"“{variant_of(name)}” became better at the target: its loss on held-out rows fell by {by}, "
        f"and the rows it answers exactly went from {exact[0]} to {exact[1]} %."
    )


def _forgot(summaries: list[Summary], subject: str) -> str:
    mean, benchmarks = _over_seeds(summaries, "mean_forgetting"), summaries[0].benchmarks
    if not benchmarks:
        return ""
    over = f"{len(benchmarks)} benchmark{'s' if len(benchmarks) > 1 else ''}"
    worse = [f"{name} ({_change(found)})" for name, found in benchmarks.items() if sign_of(found["forgetting"]) > 0]
    if mean is None:
        return f"{subject} became worse at {_and(worse)}." if worse else f"No forgetting was found on {over}."
    points = f"{shown(mean, POINTS)} points on average over {over}"
    if mean["low"] is None:
        return f"Documents are too few to say whether anything was forgotten: {points} were lost."
    if sign_of(mean) > 0:
        surely = f"; worse by itself: {_and(worse)}" if worse else ""
        return f"{subject} forgot: it lost {points}{surely}."
    alone = f" Worse by itself: {_and(worse)}." if worse else ""
    if sign_of(mean) < 0:
        return f"{subject} forgot nothing on the whole: it lost {points}, so it gained.{alone}"
    return f"No forgetting was found: it lost {points}{_power(summaries)}.{alone}"


def _change(benchmark: dict[str, Any]) -> str:
    unit = unit_of(benchmark)
    return f"{number(benchmark['base'] * unit.factor)} → {number(benchmark['tuned'] * unit.factor)} {unit.score}"


def _moved(summaries: list[Summary]) -> str:
    kl = _over_seeds(summaries, "probe_kl")
    if kl is None:
        return ""
    moved = "did not move" if kl["value"] <= UNMOVED else f"moved by {shown(kl)} nats per token"
    return f"On text that the base model writes unprompted, the tuned model's predictions {moved}."


def _power(summaries: list[Summary]) -> str:
    drops = [drop for s in summaries if (drop := detectable_mean(s)) is not None]
    if not drops:
        return ""
    if max(drops) >= 1:
        return "; with so few documents no drop could have been told from chance"
    return f"; a mean drop of {number(max(drops) * POINTS)} points would have been found with 80 % probability"


def detectable_mean(summary: Summary) -> float | None:
    """Return the smallest mean forgetting (a fraction) found with 80 % power at 5 %; None if it is not known.

    The benchmarks' own, each stretched by its chance correction, add up as independent errors do.
    """
    squares = []
    for found in summary.benchmarks.values():
        corrected, raw, own = (found[k] for k in ("chance_corrected", "forgetting", "detectable"))
        if corrected is None:
            continue
        if corrected["low"] is None:
            return None
        width = corrected["high"] - corrected["low"]
        drop = width / 2 * POWER if own is None else own * width / (raw["high"] - raw["low"])
        squares.append(drop**2)
    return math.sqrt(sum(squares)) / len(squares) if squares else None


def _compared(variants: dict[str, list[Summary]], figure: str) -> tuple[bool, str]:
    """Say whether a variant is ahead for certain, of those whose interval lies apart from its own, and which."""
    known = {name: f for name, repeats in variants.items() if (f := _over_seeds(repeats, figure))}
    if len(known) < 2:
        return False, ""
    words = COMPARED[figure]
    best = max(known, key=lambda name: words.up * float(known[name]["value"]))
    apart = {name: f for name, f in known.items() if _sign_of_difference(known[best], f) == words.up}
    own = f"{shown(known[best], words.factor)} {words.unit}"
    if apart:
        nearest = shown(max(apart.values(), key=lambda f: words.up * float(f["value"])), words.factor)
        bound = {1: "at most ", -1: "at least "}[words.up] if len(apart) > 1 else ""
        said = f"“{best}” {words.did} than {_quoted(apart)}: {own} against {bound}{nearest}"
        if near := [name for name in known if name not in apart and name != best]:
            said += f" (not told apart from {_quoted(near)})"
    else:
        said = (
            f"In {words.field}, no variant is certainly ahead: “{best}” {words.most}, {own}, but the intervals overlap"
        )
    if figure == "mean_forgetting" and sign_of(known[best]) <= 0 and known[best]["low"] is not None:
        said += f". No forgetting was found in “{best}”{_power(variants[best])}"
    return bool(apart), f"{said}."


def _quoted(names: Iterable[str]) -> str:
    return _and([f"“{name}”" for name in names])


def _sign_of_difference(one: Fig, other: Fig) -> int:
    """Return 1 or -1 where the interval of `one` lies wholly above or below that of `other`, else 0."""
    if one["low"] is None or other["low"] is None:
        return 0
    return int(one["low"] > other["high"]) - int(one["high"] < other["low"])


def _and(names: list[str], most: int = 4) -> str:
    *first, last = names if len(names) <= most else [*names[: most - 1], f"{len(names) - most + 1} more"]
    return f"{', '.join(first)} and {last}" if first else last


def print_summary(summaries: list[Summary], console: "Console") -> None:
    """Print the table and the verdict; on a narrow console in parts, with intervals on lines of their own."""
    from rich.text import Text

    print_table(summaries, console)
    for said in (verdict(summaries), *warnings(summaries)):
        console.print(Text(said))
