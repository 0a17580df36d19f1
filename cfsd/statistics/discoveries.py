"""Many benchmarks at once: which changes stand when all are looked at, and what can be said of the rest.

Twenty benchmarks that forgot nothing give one "finding" at 5 % by chance alone.
"""

import math
from collections.abc import Iterable, Sequence

from pydantic import BaseModel, ConfigDict
from scipy import stats

from cfsd.statistics.figures import FRACTION
from cfsd.statistics.forgetting import BenchmarkForgetting
from cfsd.statistics.power import detectable_change

LEVEL = 0.05
DEFINITION = (
    f"A benchmark counts as changed where its two-sided p, adjusted over all benchmarks tested by Benjamini and "
    f"Hochberg, is at most {LEVEL:g}: of those called changed, at most {100 * LEVEL:g} % are expected to be wrong."
)


class Discoveries(BaseModel):
    """The names of the benchmarks by what was found of each, in the order given."""

    model_config = ConfigDict(frozen=True)

    worse: tuple[str, ...]
    better: tuple[str, ...]
    unsettled: tuple[str, ...]  # no change found, which is not the same as none: see `detectable`


def controlled(forgotten: Sequence[BenchmarkForgetting]) -> list[BenchmarkForgetting]:
    """Return the benchmarks with `q_value`: the share of false ones to expect if all up to this one are called changed.

    The benchmarks' documents are taken as different ones, so that the tests are independent given the two
    models. Those without a p-value keep None and do not count.

    Source: Benjamini and Hochberg 1995, Controlling the false discovery rate, JRSS B 57(1), through
    `scipy.stats.false_discovery_control`.
    """
    tested = [entry.p_value for entry in forgotten if entry.p_value is not None]
    adjusted = iter(stats.false_discovery_control(tested) if tested else [])
    return [
        entry.model_copy(update={"q_value": None if entry.p_value is None else float(next(adjusted))})
        for entry in forgotten
    ]


def discoveries(forgotten: Sequence[BenchmarkForgetting]) -> Discoveries:
    """Return which benchmarks became worse or better, with false discoveries controlled at LEVEL."""
    found: dict[str, list[str]] = {"worse": [], "better": [], "unsettled": []}
    for entry in controlled(forgotten):
        found[_direction(entry)].append(entry.benchmark)
    return Discoveries(**{name: tuple(names) for name, names in found.items()})


def _direction(entry: BenchmarkForgetting) -> str:
    if entry.q_value is None or entry.q_value > LEVEL or entry.forgetting.value == 0:
        return "unsettled"
    return "worse" if entry.forgetting.value > 0 else "better"


def change_of(entry: BenchmarkForgetting) -> str:
    """Return "worse", "better" or "unsettled": by `q_value` where `controlled` has given one, else by `p_value`."""
    return _direction(entry if entry.q_value is not None else entry.model_copy(update={"q_value": entry.p_value}))


def finding(entry: BenchmarkForgetting) -> str:
    """Return what may be said of one benchmark: "worse", "better" or "no forgetting found" with the power."""
    said = change_of(entry)
    return f"no forgetting found ({power_of(entry)})" if said == "unsettled" else said


def power_of(entry: BenchmarkForgetting) -> str:
    """Return the smallest drop that would have been found, in words: to be printed beside every "not found"."""
    share, drop = entry.forgetting.unit == FRACTION, entry.detectable
    if drop is None:
        return f"{entry.num_documents} documents do not tell how small a drop would have been found"
    if share and drop > 1:
        return f"with {entry.num_documents} documents no drop would have been found"
    size = f"{100 * drop:.2g} points" if share else f"{drop:.2g} {entry.forgetting.unit}"
    return f"a drop of {size} would have been found with 80 % probability"


def detectable_mean(forgotten: Iterable[BenchmarkForgetting]) -> float | None:
    """Return the smallest mean forgetting, a fraction, that would have been found; above 1 where none would be.

    The benchmarks' own, each stretched by its correction for chance, add up as independent errors do.
    None where that of one is not known, or where none has a mean.
    """
    drops = []
    for entry in forgotten:
        if (corrected := entry.chance_corrected) is None:
            continue
        drop, raw = detectable_change(corrected), detectable_change(entry.forgetting)
        if entry.detectable is not None and drop and raw:
            drop = entry.detectable * drop / raw
        if drop is None:
            return None
        drops.append(drop)
    return math.hypot(*drops) / len(drops) if drops else None


def power_of_mean(forgotten: Iterable[BenchmarkForgetting]) -> str:
    """Return the smallest mean drop that would have been found, in words; empty where it is not known."""
    drop = detectable_mean(forgotten)
    if drop is None:
        return ""
    if drop > 1:
        return "with so few documents no mean drop would have been found"
    return f"a mean drop of {100 * drop:.2g} points would have been found with 80 % probability"
