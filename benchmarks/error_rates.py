"""How often the gate, the verdict on a budget and intervals over seeds are wrong, and what they see.

The numbers in docs/how-to and docs/explanation.

python -m benchmarks.error_rates gate       half a minute on one core
python -m benchmarks.error_rates budget     some minutes
python -m benchmarks.error_rates seeds      seconds
"""

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Annotated, NamedTuple

import numpy as np
import typer
from numpy.typing import NDArray

from cfsd.report.budget import judge
from cfsd.statistics.figures import NATS, Figure, mean_per_token
from cfsd.statistics.further_seeds import chance
from cfsd.statistics.gate import FAMILY_WISE, margin_of
from cfsd.statistics.seeds import FEWEST, over_seeds
from flows._cli import start

Floats = NDArray[np.float64]
Draw = Callable[[np.random.Generator, tuple[int, ...]], Floats]

# --- the gate

FAMILY = 8  # figures, as the tiny recipe has
FAMILIES = 200_000
SEEDS = ((5, 1), (5, 2), (5, 3), (5, 5), (8, 2), (12, 2), (12, 5))  # of the baseline, fresh
SPREADS = (0.1, 0.2, 0.3, 0.5)  # of the logarithm of probe_kl between seeds
POWER = 0.8


class Law(NamedTuple):
    """A law of seeds; `as_ratio`: of a positive figure, judged by its logarithm."""

    draw: Draw
    as_ratio: bool = False


LAWS = {
    "normal": Law(lambda rng, shape: rng.normal(1, 0.1, shape)),
    "t3": Law(lambda rng, shape: 1 + 0.1 * rng.standard_t(3, shape)),
    "log-normal .2": Law(lambda rng, shape: rng.lognormal(0, 0.2, shape), as_ratio=True),
    "log-normal .5": Law(lambda rng, shape: rng.lognormal(0, 0.5, shape), as_ratio=True),
    "log-normal 1": Law(lambda rng, shape: rng.lognormal(0, 1.0, shape), as_ratio=True),
    "log-t3": Law(lambda rng, shape: np.exp(0.3 * rng.standard_t(3, shape)), as_ratio=True),
}


class Families(NamedTuple):
    """Simulated families of honest figures: families x figures; all in units of the baseline's own deviation."""

    least: Floats  # by how much the least bad fresh seed is worse than the baseline's mean
    mean: Floats  # by how much their mean is
    deviation: Floats  # of the baseline, in units of the law's own


def simulated(name: str, baseline: int, fresh: int, families: int, *, figures: int = FAMILY, seed: int = 0) -> Families:
    """Return families in which nothing got worse."""
    law, rng = LAWS[name], np.random.default_rng(seed)
    drawn = law.draw(rng, (families, figures, baseline + fresh))
    values = np.log(drawn) if law.as_ratio else drawn
    before, after = values[..., :baseline], values[..., baseline:]
    centre, deviation = before.mean(axis=-1), before.std(axis=-1, ddof=1)
    least, mean = ((part - centre) / deviation for part in (after.min(axis=-1), after.mean(axis=-1)))
    return Families(least, mean, deviation / values.std())


@cache
def critical(baseline: int, fresh: int, family: int = FAMILY) -> float:
    """Return by how many deviations the least bad fresh seed is worse where the gate begins to call it significant."""
    low, high = 0.0, 1000.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if chance(middle, fresh, baseline) > FAMILY_WISE / family else (low, middle)
    return high


def margin(baseline: int) -> float:
    """Return the usual margin, in deviations of a baseline of that many seeds."""
    values = np.arange(baseline) / np.arange(baseline).std(ddof=1)
    return margin_of(values.tolist(), least=0.0)


def false_alarms(name: str, baseline: int, fresh: int, families: int, *, with_margin: bool = False) -> float:
    """Return the share of families of FAMILY honest figures of which the gate fails any."""
    found = simulated(name, baseline, fresh, families)
    fails = found.least >= critical(baseline, fresh)
    if with_margin:
        fails &= found.mean > margin(baseline)
    return float(fails.any(axis=1).mean())


def detectable(name: str, baseline: int, fresh: int, families: int, family: int = FAMILY) -> float:
    """Return the worsening of one of `family` figures that fails with 80 % probability, in the law's own deviations."""
    found = simulated(name, baseline, fresh, families, figures=1)
    above = np.maximum(critical(baseline, fresh, family) - found.least, margin(baseline) - found.mean)
    return float(np.quantile(above * found.deviation, POWER))


def gate_table(families: int) -> Iterator[str]:
    """Yield the lines of a table: false alarms per law with no margin at all, and what is found with the usual one."""
    yield f"| seeds: baseline, fresh | {' | '.join(LAWS)} | spreads: normal, t3 | {_factors(None)} |"
    yield f"|---|{'--:|' * (len(LAWS) + 1 + len(SPREADS))}"
    for baseline, fresh in SEEDS:
        alarms = [f"{100 * false_alarms(name, baseline, fresh, families):.2f}" for name in LAWS]
        normal, heavy = (detectable(name, baseline, fresh, families) for name in ("normal", "t3"))
        shown = f"{normal:.1f}, {heavy:.1f}"
        yield f"| {baseline}, {fresh} | {' | '.join(alarms)} | {shown} | {_factors(normal)} |"


def _factors(spreads: float | None) -> str:
    if spreads is None:
        return " | ".join(f"times, spread {spread:g}" for spread in SPREADS)
    factors = [math.exp(spreads * spread) for spread in SPREADS]
    return " | ".join(f"{factor:.1f}" if factor < 10 else f"{factor:.0f}" for factor in factors)


# --- the verdict on a budget

ROWS = (96, 256, 1024)
TRUTHS = (0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2, 1.3)  # of the budget
REPEATS = 2000


def _sequences(sigma: float) -> Draw:
    """Return divergences per token of sequences, log-normal with mean 1: as measured, they are skewed."""
    return lambda rng, shape: rng.lognormal(-(sigma**2) / 2, sigma, shape)


SEQUENCES = {"log-normal .5": _sequences(0.5), "log-normal .8": _sequences(0.8), "log-normal 1.2": _sequences(1.2)}


def ratios(name: str, rows: int, repeats: int) -> list[dict[str, float]]:
    """Return `repeats` measured figures of a divergence of 1, with their intervals, each on `rows` sequences."""
    rng, found = np.random.default_rng(0), []
    for repeat in range(repeats):
        counts = np.where(rng.random(rows) < 0.7, 128.0, rng.integers(5, 128, rows))  # some end early
        found.append(mean_per_token(SEQUENCES[name](rng, (rows,)) * counts, counts, seed=repeat).model_dump())
    return found


def shares(figures: list[dict[str, float]], truth: float) -> dict[str, float]:
    """Return how often each outcome comes if the divergence is `truth` times the budget."""
    outcomes = [judge(figure, 1 / truth, None)["outcome"] for figure in figures]
    return {outcome: outcomes.count(outcome) / len(outcomes) for outcome in ("kept", "exceeded", "cannot tell")}


def budget_table(repeats: int) -> Iterator[str]:
    """Yield the lines of a table: percent of kept / exceeded / cannot tell, per law, rows of the probe and truth."""
    yield "| divergence of sequences | rows | " + " | ".join(f"{truth:g}" for truth in TRUTHS) + " |"
    yield f"|---|--:|{'--:|' * len(TRUTHS)}"
    for name in SEQUENCES:
        for rows in ROWS:
            figures = ratios(name, rows, repeats)
            cells = [" / ".join(f"{100 * s:.0f}" for s in shares(figures, truth).values()) for truth in TRUTHS]
            yield f"| {name} | {rows} | {' | '.join(cells)} |"


# --- intervals over seeds

SCATTERS = (0.2, 0.3, 0.5, 1.0)  # of the logarithm of a divergence between seeds
HALF = 0.03  # of each seed's own interval over documents, as a share of its value


def coverage(scatter: float, repeats: int) -> float:
    """Return how often the interval over the fewest seeds that have one holds the mean of log-normal seeds."""
    rng, held = np.random.default_rng(0), 0
    truth = math.exp(scatter**2 / 2)
    for _ in range(repeats):
        values = rng.lognormal(0, scatter, FEWEST)
        ends = [Figure(value=v, low=v * (1 - HALF), high=v * (1 + HALF), unit=NATS) for v in values]
        joined = over_seeds(ends)
        held += joined.low is not None and joined.high is not None and joined.low <= truth <= joined.high
    return held / repeats


def seeds_table(repeats: int) -> Iterator[str]:
    """Yield the lines of a table: how often the interval over seeds covers, by their scatter."""
    yield "| scatter of the logarithm | covered |"
    yield "|--:|--:|"
    for scatter in SCATTERS:
        yield f"| {scatter:g} | {coverage(scatter, repeats):.3f} |"


PARTS = {
    "gate": lambda: gate_table(FAMILIES), "budget": lambda: budget_table(REPEATS), "seeds": lambda: seeds_table(REPEATS)
}  # fmt: skip


def error_rates_command(part: Annotated[str, typer.Argument(help="gate, budget or seeds")]) -> None:
    """Print a table of error rates and power."""
    if part not in PARTS:
        raise typer.BadParameter(f"{part!r} is none of {', '.join(PARTS)}")
    for line in PARTS[part]():
        print(line, flush=True)


if __name__ == "__main__":
    start(error_rates_command)
