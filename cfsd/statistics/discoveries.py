"""Many benchmarks at once: which changes remain when all are looked at, and the power where none does.

Twenty benchmarks that forgot nothing give one "finding" at 5 % by chance alone.
"""

import math
from collections.abc import Iterable, Sequence

import scipy  # its `stats` takes 0.7 s to import, which happens where it is used

from cfsd.statistics.figures import FRACTION
from cfsd.statistics.forgetting import BenchmarkForgetting
from cfsd.statistics.power import LEVEL, detectable_change, detectable_share

DEFINITION = (
    f"A benchmark counts as changed where its two-sided p, adjusted over all benchmarks tested by Benjamini and "
    f"Hochberg, is at most {LEVEL:g}: of those called changed, at most {100 * LEVEL:g} % are expected to be wrong."
)


def controlled(forgotten: Sequence[BenchmarkForgetting]) -> list[BenchmarkForgetting]:
    """Return the benchmarks with `q_value`: the share of false ones to expect if all up to this one are called changed.

    The benchmarks' documents are taken as different ones, so that the tests are independent given the two
    models. Those without a p-value keep None and do not count. `detectable` is that of this control: the drop of one
    benchmark alone that it finds with 80 % probability.

    Source: Benjamini and Hochberg 1995, Controlling the false discovery rate, JRSS B 57(1), through
    `scipy.stats.false_discovery_control`.
    """
    tested = [entry.p_value for entry in forgotten if entry.p_value is not None]
    adjusted, level = iter(false_discovery(tested)), LEVEL / max(1, len(tested))
    return [
        entry.model_copy(
            update={
                "q_value": None if entry.p_value is None else next(adjusted),
                "detectable": _detectable(entry, level),
            }
        )
        for entry in forgotten
    ]


def _detectable(entry: BenchmarkForgetting, level: float) -> float | None:
    """Return the smallest drop that is found in a test at `level`, as of the only benchmark that lost anything."""
    if entry.detectable is None or entry.right_to_wrong is None or entry.wrong_to_right is None:
        return detectable_change(entry.forgetting, level)
    return detectable_share(entry.right_to_wrong + entry.wrong_to_right, entry.num_documents, level)


def false_discovery(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted by Benjamini and Hochberg, in their order."""
    return [float(p) for p in scipy.stats.false_discovery_control(p_values)] if p_values else []


def change_of(entry: BenchmarkForgetting) -> str:
    """Return "worse", "better" or "unsettled": by `q_value` where `controlled` has given one, else by `p_value`.

    "unsettled" is not the same as no change: see `detectable`.
    """
    value = entry.p_value if entry.q_value is None else entry.q_value
    if value is None or value > LEVEL or entry.forgetting.value == 0:
        return "unsettled"
    return "worse" if entry.forgetting.value > 0 else "better"


def finding(entry: BenchmarkForgetting) -> str:
    """Return what may be claimed of one benchmark: "worse", "better" or "no forgetting found" with the power."""
    change = change_of(entry)
    return f"no forgetting found ({power_of(entry)})" if change == "unsettled" else change


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
        drop, raw, own = detectable_change(corrected), detectable_change(entry.forgetting), _detectable(entry, LEVEL)
        if own is not None and drop and raw:
            drop = own * drop / raw
        if drop is None:
            return None
        drops.append(drop)
    return math.hypot(*drops) / len(drops) if drops else None
