"""What each variant lost on each benchmark, with intervals, one below the other."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cfsd.report.figures.look import INK, SIZE, WIDTH, Style, errorbar, plain_axes, set_names, styles
from cfsd.report.figures.point import certain, scaled
from cfsd.report.summary import Summary
from cfsd.report.table import change_of_score, unit_of


def forest_figures(summaries: list[Summary]) -> dict[str, Figure]:
    """Return per unit ("points", "nats/token", …) what each variant lost on each benchmark."""
    units: dict[str, dict[str, list[tuple[str, dict[str, Any]]]]] = {}
    for summary in summaries:
        for benchmark, result in summary.benchmarks.items():
            rows = units.setdefault(unit_of(result).lost, {}).setdefault(benchmark, [])
            rows.append((summary.name, result))
    look = styles(s.name for s in summaries)
    return {unit: _forest(benchmarks, unit, look) for unit, benchmarks in units.items()}


def _forest(benchmarks: dict[str, list[tuple[str, dict[str, Any]]]], unit: str, look: dict[str, Style]) -> Figure:
    grouped = len(look) > 1
    lines = sum(len(rows) + grouped for rows in benchmarks.values())
    figure = Figure((WIDTH, 1.0 + 0.22 * lines), layout="constrained")
    axes = figure.subplots()
    plain_axes(axes, f"{unit} lost, with 95 % interval (right of 0: worse)", "")
    axes.axvline(0, color=INK, lw=1)
    axes.grid(axis="y", visible=False)
    labels: list[str] = []
    headings = []
    for benchmark, rows in benchmarks.items():
        if grouped:
            headings.append(len(labels))
            labels.append(benchmark)
        for name, result in rows:
            scale = unit_of(result)
            errorbar(axes, scaled(result["forgetting"], scale.factor), certain(len(labels)), look[name])
            _write_beside(axes, len(labels), change_of_score(result))
            labels.append(name if grouped else benchmark)
    set_names(axes.yaxis, labels)
    for row in headings:
        axes.get_yticklabels()[row].set_fontweight("bold")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(labels) - 0.4, -1.3)
    _write_beside(axes, -0.8, f"base → tuned, {scale.score}")
    return figure


def _write_beside(axes: Axes, y: float, text: str) -> None:
    place: Any = {"transform": axes.get_yaxis_transform(), "va": "center", "parse_math": False}
    axes.text(1.03, y, text, size=SIZE - 1, color=INK, **place)
