"""Differences between variants as they are shown: matrices on the page, lines for terminal and card, metrics."""

from typing import NamedTuple

from cfsd.report.compared import BENCHMARK, Compared, Comparisons
from cfsd.report.summary import Summary
from cfsd.report.table import shown, unit_called
from cfsd.report.verdict import best, variants_of

MAX_OPEN = 6  # variants up to which the page shows whole matrices unfolded
MAX_LINES = 8
OPEN = "not shown to differ"


class Quantity(NamedTuple):
    """A measure that variants are compared by: its name, and what a difference is called, above 0 and below."""

    label: str
    above: str
    below: str
    better: int = 0  # 1: above is better, -1: below is; 0: not judged


QUANTITIES = {
    "target_gain": Quantity("target gain", "learned more", "learned less", 1),
    "probe_kl": Quantity("probe_kl", "moved further", "moved less"),
    "chat_kl": Quantity("chat_kl", "moved further in chats", "moved less in chats"),
    "mean_forgetting": Quantity("mean forgetting", "lost more", "lost less", -1),
}


class Cell(NamedTuple):
    """A difference as text, and what is found of it, if anything is."""

    text: str
    found: str
    style: str  # of the page: better, worse, differs or nothing


class Table(NamedTuple):
    """Cells with their headings; None where there is no difference to show."""

    title: str
    columns: list[str]
    rows: dict[str, list[Cell | None]]


class Differences(NamedTuple):
    """What the page shows of a comparison."""

    best: str
    against: Table  # the best variant less each other one, a column per quantity
    matrices: list[Table]  # row minus column, for every pair
    is_open: bool
    benchmarks: list[tuple[Compared, str]]  # on which two variants differ, with the difference as text
    num_benchmarks: int  # differences tested


def differences_of(summaries: list[Summary], comparisons: Comparisons) -> Differences | None:
    """Return what was compared of `summaries`, None where nothing was."""
    if not comparisons.entries:
        return None
    variants = variants_of(summaries)
    names, first = [v.name for v in variants], best(variants, comparisons).name
    units = {c.measure: unit_called(c.unit).lost for c in comparisons.entries if c.measure in QUANTITIES}
    titles = {measure: f"{QUANTITIES[measure].label}, {unit}" for measure, unit in units.items()}

    def cells(one: str, others: list[str], measures: list[str]) -> list[Cell | None]:
        return [_cell(comparisons.of(one, other, measure)) for other in others for measure in measures]

    against = {other: cells(first, [other], list(titles)) for other in names if other != first}
    matrices = [Table(title, names, {n: cells(n, names, [m]) for n in names}) for m, title in titles.items()]
    of_benchmarks = [c for c in comparisons.entries if c.measure.startswith(BENCHMARK)]
    found = [(c, f"{_text(c)} {unit_called(c.unit).lost}") for c in of_benchmarks if c.sign()]
    return Differences(
        first, Table("", list(titles.values()), against), matrices if len(names) > 2 else [], len(names) <= MAX_OPEN,
        found, len(of_benchmarks),
    )  # fmt: skip


def lines_against(name: str, comparisons: Comparisons, *, only_found: bool) -> list[str]:
    """Return a line per variant that the one called `name` was compared with: every quantity and what is found of it.

    With `only_found` the lines without any finding are left out. Beyond MAX_LINES the last line counts the rest.
    """
    others = dict.fromkeys(c.other if c.one == name else c.one for c in comparisons.entries if name in (c.one, c.other))
    lines = []
    for other in others:
        compared = {q: c for m, q in QUANTITIES.items() if (c := comparisons.of(name, other, m))}
        if compared and (not only_found or any(c.sign() for c in compared.values())):
            said = [
                f"{q.label} {_text(c)} {unit_called(c.unit).lost}, {_found(c) or OPEN}" for q, c in compared.items()
            ]
            lines.append(f"“{name}” less “{other}”: {'; '.join(said)}.")
    more = len(lines) - MAX_LINES
    are = "difference is" if more == 1 else "differences are"
    return [*lines[:MAX_LINES], f"{more} more {are} in the report."] if more > 0 else lines


def metrics_of(comparisons: Comparisons) -> dict[str, float]:
    """Return the differences by the name of their metric in MLflow, with bounds and adjusted p."""
    flat: dict[str, float | None] = {}
    for c in comparisons.entries:
        if c.measure in QUANTITIES:
            name = f"comparison/{c.one} - {c.other}/{c.measure}"
            flat |= {name: c.value, f"{name}_low": c.low, f"{name}_high": c.high, f"{name}_p": c.adjusted_p}
    return {name: value for name, value in flat.items() if value is not None}


def _text(entry: Compared) -> str:
    return shown(entry.figure(), unit_called(entry.unit).factor)


def _cell(entry: Compared | None) -> Cell | None:
    if entry is None:
        return None
    sign, better = entry.sign() or 0, QUANTITIES[entry.measure].better
    style = {1: "better", -1: "worse"}.get(better * sign, "differs" if sign else "")
    return Cell(_text(entry) + ("" if entry.paired else " (unpaired)"), _found(entry), style)


def _found(entry: Compared) -> str:
    quantity = QUANTITIES[entry.measure]
    return {1: quantity.above, -1: quantity.below}.get(entry.sign() or 0, "")
