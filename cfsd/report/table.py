"""The figures of many variants as a table of texts: for a page, a data frame and the terminal."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import pandas as pd

from cfsd.generate.spec import UNPROMPTED
from cfsd.report.measures import MEASURES, Measure, figure_of
from cfsd.report.summary import Fig, Summary
from cfsd.spec import REPEAT
from cfsd.stages import CHAT
from cfsd.statistics.discoveries import change_of
from cfsd.statistics.figures import FRACTION, Figure
from cfsd.statistics.forgetting import BenchmarkForgetting
from cfsd.statistics.power import detectable_change

T = TypeVar("T")
POINTS = 100  # percentage points in a fraction of 1


def number(value: float, digits: int = 3) -> str:
    """Return `value` with so many significant digits, without an exponent where that is readable."""
    if value == 0:
        return "0"
    if not 1e-5 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:.{max(0, digits - 1 - math.floor(math.log10(abs(rounded))))}f}"


def shown(figure: Fig, factor: float = 1) -> str:
    """Return a figure times `factor` as `0.123 [0.101, 0.148]`, or without brackets if it has no interval."""
    value, low, high = (None if figure[k] is None else number(figure[k] * factor) for k in ("value", "low", "high"))
    return f"{value}" if low is None else f"{value} [{low}, {high}]"


def variant_of(name: str) -> str:
    """Return the variant that `name` is a repeat of: "rehearse" for "rehearse seed=3"."""
    return name.partition(REPEAT)[0]


def by_variant(named: Iterable[tuple[str, T]]) -> dict[str, list[T]]:
    """Return what belongs to each variant, in the order of `named`: pairs of a run's name and anything of the run."""
    groups: dict[str, list[T]] = {}
    for name, of_run in named:
        groups.setdefault(variant_of(name), []).append(of_run)
    return groups


class Sweep(NamedTuple):
    """One point of a sweep: "wise alpha=0.5 seed=1" is the point 0.5, written "0.5", of the family "wise seed=1"."""

    family: str  # without the seed: "wise"
    repeat: str  # " seed=1"
    text: str
    value: float


def sweep_of(name: str) -> Sweep | None:
    """Return the point of a sweep that the variant called `name`, or its repeat, is; None if it is none."""
    variant, seed, number_of_seed = name.partition(REPEAT)
    point = re.fullmatch(r"(.+) [^\s=]+=([-+]?\d+\.?\d*(?:e[-+]?\d+)?)", variant)
    return Sweep(point[1], seed + number_of_seed, point[2], float(point[2])) if point else None


def family_of(name: str) -> str:
    """Return what shares a look with the variant called `name`: its sweep, else the variant that it is a repeat of."""
    sweep = sweep_of(name)
    return sweep.family if sweep else variant_of(name)


class Unit(NamedTuple):
    """How a benchmark's scores and losses are shown, and by what they are multiplied for that."""

    score: str
    lost: str
    factor: float


def unit_of(benchmark: dict[str, Any]) -> Unit:
    """Return how a `BenchmarkForgetting` is shown."""
    return unit_called(benchmark["forgetting"]["unit"])


def unit_called(name: str) -> Unit:
    """Return how figures in that unit are shown: shares in percent and points, others as they are."""
    return Unit("%", "points", POINTS) if name == FRACTION else Unit(name, name, 1)


def change_of_score(benchmark: dict[str, Any]) -> str:
    """Return the score of a `BenchmarkForgetting` before and after, in the benchmark's unit: `90.0 → 60.0`."""
    factor = unit_of(benchmark).factor
    return " → ".join(told_apart(benchmark["base"] * factor, benchmark["tuned"] * factor))


def told_apart(one: float, other: float) -> tuple[str, str]:
    """Return two numbers with three significant digits, or with as many more, up to nine, as tell them apart."""
    texts = [(number(one, digits), number(other, digits)) for digits in range(3, 10)]
    return next((pair for pair in texts if pair[0] != pair[1]), texts[0])


NATS_PER_TOKEN = Unit("nats/token", "nats/token", 1)
KEPT = "kept above chance, %"
ENDINGS = {"at_limit": "answers at the length limit", "unfinished": "reasoning unfinished"}


class Line(NamedTuple):
    """One row of the table, as text; `marks` says per variant "worse", "better" or nothing for certain."""

    label: str
    base: str
    cells: list[str]
    marks: Sequence[str] = ()
    is_part: bool = False  # of the row above it


def lines_of(summaries: list[Summary]) -> list[Line]:
    """Return the table's rows; figures that no variant has are left out."""
    lines = [line for measure in MEASURES if measure.label for line in _measure(measure, summaries)]
    lines += _budgets([s.budget or {} for s in summaries])
    for name in dict.fromkeys(name for s in summaries for name in s.benchmarks):
        lines += [*_benchmark(name, summaries), *_answers(name, summaries)]
    for name in dict.fromkeys(name for s in summaries for name in s.texts):
        lines += _text(name, summaries)
    for name in dict.fromkeys(name for s in summaries for name in s.prompts):
        divergences = [s.prompts[name]["kl"] if name in s.prompts else None for s in summaries]
        lines.append(_figures(f"{name}: divergence, nats/token", divergences, is_part=False))
    return [line for line in lines if any(line.cells)]


def _measure(measure: Measure, summaries: list[Summary]) -> Iterator[Line]:
    if measure.scores:
        heading, name = measure.scores
        pairs = [(s.target.get(f"base_{name}"), s.target.get(f"tuned_{name}")) for s in summaries]
        yield _scores(heading, pairs, measure.factor)
    figures = [figure_of(s, measure.name) for s in summaries]
    yield _figures(measure.label, figures, measure.factor, measure.better, is_part=measure.scores is not None)
    if measure.detectable:
        open_ = [figure is not None and sign_of(figure) == 0 for figure in figures]
        changes = [measure.detectable(forgotten_of(s)) for s in summaries]
        yield _power(Unit("%", "points", POINTS) if measure.factor == POINTS else NATS_PER_TOKEN, changes, open_)


def forgotten_of(summary: Summary) -> list[BenchmarkForgetting]:
    """Return what a summary's benchmarks lost, as what they were before they became JSON."""
    return [BenchmarkForgetting.model_validate(entry | {"benchmark": n}) for n, entry in summary.benchmarks.items()]


def _benchmark(name: str, summaries: list[Summary]) -> list[Line]:
    """Return the scores, what was lost, and what is detectable; marks are under false-discovery control."""
    results = [s.benchmarks.get(name) for s in summaries]
    entries = [BenchmarkForgetting.model_validate(r | {"benchmark": name}) if r else None for r in results]
    first = next(result for result in results if result)
    unit = unit_of(first)
    pairs = [(r["base"], r["tuned"]) if r else (None, None) for r in results]
    metric = "" if unit.score == first["metric"] else f"{first['metric']}, "
    lower = "" if first.get("higher_is_better", True) or first.get("perplexity_factor") else ", lower is better"
    changes = ["" if entry is None else change_of(entry) for entry in entries]
    lost = _figures(f"lost, {unit.lost}", [r["forgetting"] if r else None for r in results], unit.factor)
    return [
        _scores(f"{name}: {metric}{unit.score}{lower}", pairs, unit.factor),
        lost._replace(marks=["" if change == "unsettled" else change for change in changes]),
        _power(unit, [e.detectable if e else None for e in entries], [change == "unsettled" for change in changes]),
        _figures(KEPT, [r["retention"] if r else None for r in results], POINTS, is_part=True),
    ]


def _answers(name: str, summaries: list[Summary]) -> Iterator[Line]:
    answers = [s.answers.get(name, {}) for s in summaries]
    for ending, label in ENDINGS.items():
        shares = [(a.get("base", {}).get(ending), a.get("tuned", {}).get(ending)) for a in answers]
        if any(share for pair in shares for share in pair):
            yield _scores(f"{label}, %", shares, POINTS)._replace(is_part=True)


def _text(name: str, summaries: list[Summary]) -> list[Line]:
    results = [s.texts[name]["per_token"] if name in s.texts else None for s in summaries]
    rises = [r["forgetting"] if r else None for r in results]
    drops = [detectable_change(Figure.model_validate(rise)) if rise else None for rise in rises]
    return [
        _scores(f"{name}: loss, nats/token", [(r["base"], r["tuned"]) if r else (None, None) for r in results]),
        _figures("lost, nats/token", rises, better=-1),
        _power(NATS_PER_TOKEN, drops, [rise is not None and sign_of(rise) == 0 for rise in rises]),
    ]


def _power(unit: Unit, drops: list[float | None], unsettled: list[bool]) -> Line:
    cells = [_detectable(drop, unit) if open_ else "" for drop, open_ in zip(drops, unsettled, strict=True)]
    return Line(f"detectable, {unit.lost}", "", cells, is_part=True)


def _detectable(drop: float | None, unit: Unit) -> str:
    if drop is None:
        return "unknown"
    return "none" if unit.factor == POINTS and drop > 1 else f"from {number(drop * unit.factor)}"


def _budgets(budgets: list[dict[str, Any]]) -> list[Line]:
    modes = [modes_of(budget) for budget in budgets]
    named = dict.fromkeys(mode for own in modes for mode in own)
    alphas = ["" if (alpha := b.get("alpha")) is None else number(alpha) for b in budgets]
    return [
        *(line for mode in named for line in _budget(mode, [own.get(mode, {}) for own in modes])),
        Line("merged at alpha", "", alphas, is_part=True),
        _figures("gain given up, nats/token", [b.get("target_gain_cost") for b in budgets], better=-1),
    ]


def modes_of(budget: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what a summary says of the budget of each mode; where it has no `modes`, it is that of unprompted text."""
    return budget.get("modes") or ({UNPROMPTED: budget} if budget else {})


def _budget(mode: str, budgets: list[dict[str, Any]]) -> list[Line]:
    measure = {UNPROMPTED: "probe_kl", CHAT: "chat_kl"}.get(mode, mode)
    marks = ["worse" if b.get("outcome") == "exceeded" else "" for b in budgets]
    return [
        Line(f"budget of {measure}, nats/token", "", [number(b["nats"]) if b else "" for b in budgets]),
        _figures("used, % of the budget", [b.get("ratio") for b in budgets], POINTS),
        Line("outcome", "", [", ".join(_outcome(b)) for b in budgets], marks, is_part=True),
    ]


def _outcome(budget: dict[str, Any]) -> Iterator[str]:
    if outcome := budget.get("outcome"):
        yield outcome
        if outcome == "kept" and budget["tight"]:
            yield "used up"
        if not budget["binding"]:
            yield "not binding"


def _scores(label: str, pairs: list[tuple[float | None, float | None]], factor: float = 1) -> Line:
    bases = [base for base, _ in pairs if base is not None]
    cells = []
    for base, tuned in pairs:
        text = "" if tuned is None else number(tuned * factor)
        if base is not None and base != bases[0]:  # not the base model, or the rows, of the first variant
            text = f"{number(base * factor)} → {text}"
        cells.append(text)
    return Line(label, number(bases[0] * factor) if bases else "", cells)


def _figures(
    label: str, figures: list[Fig | None], factor: float = 1, better: int = 0, *, is_part: bool = True
) -> Line:
    cells = ["" if figure is None else shown(figure, factor) for figure in figures]
    marks = [{1: "better", -1: "worse"}.get(better * sign_of(figure), "") for figure in figures]
    return Line(label, "", cells, marks, is_part)


def side_of(figure: Fig) -> int | None:
    """Return 1 or -1 where the whole interval is above or below 0, 0 where it holds it, None where there is none."""
    return None if figure["low"] is None else int(figure["low"] > 0) - int(figure["high"] < 0)


def sign_of(figure: Fig | None) -> int:
    """Return 1 or -1 where the whole interval is on that side of 0, else 0."""
    return (figure and side_of(figure)) or 0


def summary_frame(summaries: list[Summary]) -> pd.DataFrame:
    """Return the table as text: a row per figure, columns `figure`, `base` and one per variant."""
    rows, main = [], ""
    for line in lines_of(summaries):
        if not line.is_part:
            main = re.split("[:,]", line.label)[0]
        rows.append([f"{main}: {line.label}" if line.is_part else line.label, line.base, *line.cells])
    names: list[str] = []
    for name in ("figure", "base", *(summary.name for summary in summaries)):
        names.append(f"{name} ({len(names)})" if name in names else name)  # a variant may be called base
    return pd.DataFrame(rows, columns=names, dtype=object)
