"""Many tests at once: p-values adjusted so that the probability of any false finding is bounded."""

from collections.abc import Sequence


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the adjusted p-values, in their order.

    Where those up to a level are called findings, the probability that any of them is false is at most that level,
    however the tests depend on each other.

    Source: Holm 1979, A simple sequentially rejective multiple test procedure, Scand. J. Statistics 6.
    """
    adjusted, largest, left = [0.0] * len(p_values), 0.0, len(p_values)
    for i in sorted(range(len(p_values)), key=lambda i: p_values[i]):
        largest = max(largest, min(1.0, left * p_values[i]))
        adjusted[i], left = largest, left - 1
    return adjusted


def rejected(p_values: Sequence[float], level: float) -> list[bool]:
    """Return which hypotheses Holm's procedure rejects: a wrong rejection has at most probability `level`."""
    return [p <= level for p in holm(p_values)]
