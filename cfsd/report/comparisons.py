"""What several variants are to one another: which learned more or lost less, within what the intervals allow."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from cfsd.report.summary import Summary
from cfsd.report.table import POINTS, Fig, forgotten_of, number, shown, sign_of, unit_of, variant_of
from cfsd.statistics import seeds
from cfsd.statistics.discoveries import change_of, detectable_mean, power_of_mean
from cfsd.statistics.figures import Figure


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


def variants_of(summaries: list[Summary]) -> dict[str, list[Summary]]:
    """Return the repeats of each variant, by its name."""
    found: dict[str, list[Summary]] = {}
    for summary in summaries:
        found.setdefault(variant_of(summary.name), []).append(summary)
    return found


def over_seeds(repeats: list[Summary], name: str) -> Fig | None:
    """Return a figure over the repeats; of fewer than FEWEST seeds, its ends hold those of every seed."""
    figures = [Figure.model_validate(figure) for s in repeats if (figure := getattr(s, name)) is not None]
    if not figures or len(figures) < len(repeats):
        return None
    if len(figures) == 1:
        return figures[0].model_dump()
    joined = seeds.over_seeds(figures).figure
    lows, highs = [f.low for f in figures if f.low is not None], [f.high for f in figures if f.high is not None]
    if len(figures) >= seeds.FEWEST or len(lows) < len(figures):
        return joined.model_dump()
    return joined.model_dump() | {"low": min(lows), "high": max(highs)}


def power_over(repeats: list[Summary]) -> str:
    """Return the smallest mean drop that would have been found in any one of the repeats, in words."""
    return power_of_mean(max((forgotten_of(s) for s in repeats), key=lambda entries: detectable_mean(entries) or 0))


def comparisons(variants: dict[str, list[Summary]]) -> list[str]:
    """Return a sentence per figure that two variants have; what is sure comes first."""
    compared = [_compared(variants, figure) for figure in COMPARED]
    return [sentence for _, sentence in sorted(compared, key=lambda found: not found[0]) if sentence]


def _compared(variants: dict[str, list[Summary]], figure: str) -> tuple[bool, str]:
    """Say whether a variant is ahead for certain, of those whose interval lies apart from its own, and which."""
    known = {name: f for name, repeats in variants.items() if (f := over_seeds(repeats, figure))}
    if len(known) < 2:
        return False, ""
    words = COMPARED[figure]
    best = max(known, key=lambda name: words.up * float(known[name]["value"]))
    apart = {name: f for name, f in known.items() if _sign_of_difference(known[best], f) == words.up}
    own = f"{shown(known[best], words.factor)} {words.unit}"
    if apart:
        nearest = shown(max(apart.values(), key=lambda f: words.up * float(f["value"])), words.factor)
        bound = {1: "at most ", -1: "at least "}[words.up] if len(apart) > 1 else ""
        said = f"“{best}” {words.did} than {quoted(apart)}: {own} against {bound}{nearest}"
        if near := [name for name in known if name not in apart and name != best]:
            said += f" (not told apart from {quoted(near)})"
    else:
        said = (
            f"In {words.field}, no variant is certainly ahead: “{best}” {words.most}, {own}, but the intervals overlap"
        )
    if figure == "mean_forgetting" and sign_of(known[best]) <= 0 and known[best]["low"] is not None:
        said += f"; no forgetting was found in “{best}”{where(power_over(variants[best]))}"
        if worse := surely_worse(variants[best]):
            said += f", but worse by itself: {listed(worse)}"
    return bool(apart), f"{said}."


def _sign_of_difference(one: Fig, other: Fig) -> int:
    """Return 1 or -1 where the interval of `one` lies wholly above or below that of `other`, else 0."""
    if one["low"] is None or other["low"] is None:
        return 0
    return int(one["low"] > other["high"]) - int(one["high"] < other["low"])


def surely_worse(summaries: list[Summary]) -> list[str]:
    """Return the benchmarks that every repeat found worse, under its false-discovery control, with their scores."""
    found = [{e.benchmark for e in forgotten_of(s) if change_of(e) == "worse"} for s in summaries]
    benchmarks = summaries[0].benchmarks.items()
    return [f"{name} ({_change(entry)})" for name, entry in benchmarks if all(name in names for names in found)]


def _change(benchmark: dict[str, Any]) -> str:
    unit = unit_of(benchmark)
    return f"{number(benchmark['base'] * unit.factor)} → {number(benchmark['tuned'] * unit.factor)} {unit.score}"


def where(power: str) -> str:
    """Return the power of a test as the end of a sentence."""
    return f", where {power}" if power.startswith("a ") else f", {power}" if power else ""


def quoted(names: Iterable[str]) -> str:
    """Return the names in quotes, as a list in a sentence."""
    return listed([f"“{name}”" for name in names])


def listed(names: list[str], most: int = 4) -> str:
    """Return `names` as a list in a sentence; of many, how many more."""
    *first, last = names if len(names) <= most else [*names[: most - 1], f"{len(names) - most + 1} more"]
    return f"{', '.join(first)} and {last}" if first else last
