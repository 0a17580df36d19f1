"""The picture of the architecture, drawn from the import statements of the code.

python docs/architecture.py            writes docs/explanation/architecture.svg
python docs/architecture.py --check    fails if the picture is older than the imports
"""

import argparse
import ast
import hashlib
import json
import sys
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as MplPath

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "explanation" / "architecture.svg"
LAYERS = ("cfsd", "tasks", "flows")
COLOURS = {"cfsd": "#e0f2f1", "tasks": "#fff3e0", "flows": "#e8eaf6"}
Graph = dict[str, set[str]]


def package_of(module: str) -> str:
    """Return the box of a module: `cfsd.train` for `cfsd.train.loss.packed`, `tasks` for all of tasks."""
    layer, *rest = module.split(".")
    return f"{layer}.{rest[0]}" if layer == "cfsd" and rest else layer


def imports() -> Graph:
    """Return which package imports which, late imports included. Tests of the code hold it free of circles."""
    files = {path: _module(path) for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))}
    boxes = {package_of(module) for module in files.values()} - {"cfsd"}
    graph: Graph = {box: set() for box in sorted(boxes)}
    for path, module in files.items():
        if (box := package_of(module)) in boxes:
            graph[box] |= {package_of(name) for name in _imported(path)} & boxes - {box}
    return graph


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(path: Path) -> Iterable[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def reduced(graph: Graph) -> Graph:
    """Return the graph without the arrows that follow from others: the least that has the same order."""
    reach: Graph = {}
    for box in TopologicalSorter(graph).static_order():
        reach[box] = set().union(*({below} | reach[below] for below in graph[box]))
    return {box: {b for b in below if not any(b in reach[other] for other in below)} for box, below in graph.items()}


def ranks(graph: Graph) -> dict[str, int]:
    """Return each package's row, from 0 at the top: one below the lowest package that imports it."""
    above: Graph = {box: {other for other, below in graph.items() if box in below} for box in graph}
    row: dict[str, int] = {}
    for box in TopologicalSorter(above).static_order():
        row[box] = 1 + max((row[other] for other in above[box]), default=-1)
    return row


def routed(graph: Graph, row: dict[str, int]) -> tuple[list[list[str]], dict[str, list[str]]]:
    """Return the rows, with a way point in every row that an arrow passes, and each arrow's points from box to box."""
    rows: list[list[str]] = [[] for _ in range(max(row.values()) + 1)]
    for box in sorted(graph):
        rows[row[box]].append(box)
    arrows = {}
    for box in sorted(graph):
        for other in sorted(graph[box]):
            points = [f"{box}>{other}@{r}" for r in range(row[box] + 1, row[other])]
            for r, point in enumerate(points, row[box] + 1):
                rows[r].append(point)
            arrows[f"{box}>{other}"] = [box, *points, other]
    return rows, arrows


def arranged(rows: list[list[str]], arrows: dict[str, list[str]]) -> dict[str, tuple[float, float]]:
    """Return the place of each box and way point: in its row, near what it is joined to."""
    joined: dict[str, list[str]] = {}
    for points in arrows.values():
        for upper, lower in pairwise(points):
            joined.setdefault(upper, []).append(lower)
            joined.setdefault(lower, []).append(upper)
    x = {name: place for row in rows for name, place in zip(row, _spread(row), strict=True)}
    for _ in range(60):
        for row in rows:
            wish = {name: fmean(x[other] for other in joined.get(name, [name])) for name in row}
            row.sort(key=wish.__getitem__)
            middle = fmean(wish.values()) / 3  # towards the middle of the page
            x |= {name: middle + place for name, place in zip(row, _spread(row), strict=True)}
        centre = (max(x.values()) + min(x.values())) / 2
        x = {name: place - centre for name, place in x.items()}
    return {name: (x[name], -float(r)) for r, row in enumerate(rows) for name in row}


def _spread(row: list[str]) -> list[float]:
    """Return the places of a row around 0: a box takes 2.0, a way point 0.5."""
    widths = [0.5 if "@" in name else 2.0 for name in row]
    ends = list(accumulate(widths))
    return [end - width / 2 - ends[-1] / 2 for end, width in zip(ends, widths, strict=True)]


def draw(graph: Graph, to: Path) -> None:
    """Write the picture; an arrow goes from a package to one that it imports."""
    arrows = reduced(graph)
    places_of = routed(arrows, ranks(arrows))
    places = arranged(*places_of)
    left, right = min(x for x, _ in places.values()) - 1.1, max(x for x, _ in places.values()) + 1.1
    bottom = min(y for _, y in places.values()) - 0.4
    figure, axes = plt.subplots(figsize=(0.76 * (right - left), 0.95 * -bottom))
    for box in graph:
        _box(axes, box, *places[box])
    for points in places_of[1].values():
        _arrow(axes, [places[point] for point in points])
    axes.set(xlim=(left, right), ylim=(bottom, 0.4))
    axes.axis("off")
    with matplotlib.rc_context({"svg.hashsalt": "cfsd", "svg.fonttype": "path"}):
        figure.savefig(to, bbox_inches="tight", metadata={"Date": None, "Description": mark(arrows)})
    plt.close(figure)


def _box(axes: Axes, box: str, x: float, y: float) -> None:
    layer, _, name = box.partition(".")
    is_module = (ROOT / layer / f"{name}.py").exists()
    style = "round,pad=0,rounding_size=0.12" if is_module else "square,pad=0"
    patch = FancyBboxPatch((x - 0.92, y - 0.2), 1.84, 0.4, boxstyle=style, fc=COLOURS[layer], ec="#37474f", zorder=3)
    axes.add_patch(patch)
    label = f"{name}.py" if is_module else f"{name or layer}/"
    size, weight = (9 if len(label) < 16 else 7.5), ("normal" if is_module else "bold")
    axes.text(x, y, label, ha="center", va="center", fontsize=size, zorder=4, weight=weight)


def _arrow(axes: Axes, points: list[tuple[float, float]]) -> None:
    """Draw a smooth line through the points, upright where it leaves, passes and arrives."""
    (x, y), *passed, (to_x, to_y) = points
    stops = [(x, y - 0.2), *passed, (to_x, to_y + 0.21)]
    path, codes = [stops[0]], [MplPath.MOVETO]
    for (a, b), (c, d) in pairwise(stops):
        path += [(a, (b + d) / 2), (c, (b + d) / 2), (c, d)]
        codes += [MplPath.CURVE4] * 3
    axes.add_patch(
        FancyArrowPatch(path=MplPath(path, codes), arrowstyle="-|>", mutation_scale=9, color="#607d8b", lw=1, zorder=2)
    )


def mark(arrows: Graph) -> str:
    """Return a digest of what is drawn, which the picture carries."""
    text = json.dumps({box: sorted(below) for box, below in sorted(arrows.items())})
    return f"arrows {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def is_current() -> bool:
    """Say whether the picture shows the imports as they are."""
    try:
        return PICTURE.exists() and mark(reduced(imports())) in PICTURE.read_text()
    except CycleError:
        return False


def main() -> None:
    """Draw the picture, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        sys.exit(0 if is_current() else "the picture is older than the imports: make docs-picture")
    try:
        draw(imports(), PICTURE)
    except CycleError as error:
        sys.exit(f"packages import each other in a circle, which cannot be drawn: {' -> '.join(error.args[1])}")


if __name__ == "__main__":
    main()
