"""Several repeats of one sequence of targets, each with seeds of its own: the R matrix and its figures over seeds."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from cfsd.report.files import SCHEMA, ReportSource, read_kept, read_part
from cfsd.report.place import slug
from cfsd.report.rendering import rendered, write_page
from cfsd.report.run_record import Measured
from cfsd.report.scores import table
from cfsd.report.sequence.drawing import stages_of
from cfsd.report.sequence.files import read_measured, write_sequence_files
from cfsd.report.sequence.retention import Retention
from cfsd.report.table import POINTS
from cfsd.statistics.figures import FRACTION, NATS, Figure, mean_of, mean_per_token, share_of
from cfsd.statistics.intervals import Interval
from cfsd.statistics.seeds import DEFINITION, over_seeds
from cfsd.store.artifact import Artifact, Store
from cfsd.store.digests import write_json

REPEATS = "repeats.json"
Row = tuple[Figure, ...]


class Line(NamedTuple):
    """How a figure is shown: its name for a reader, and by what it is multiplied."""

    text: str
    factor: float = 1


LINES = {
    "final_exact": Line("held-out responses that the last model answers exactly, mean over the targets, %", POINTS),
    "final_loss": Line("held-out loss of the last model, mean over the targets, nats/token"),
    "backward_transfer_exact": Line("backward transfer of the share exact, points (negative: worse)", POINTS),
    "backward_transfer": Line("backward transfer of minus the loss, nats/token (negative: worse)"),
    "probe_kl": Line("probe_kl of the last model from the first base, nats/token"),
    "mean_forgetting": Line("mean forgetting of the last model since the first base, points", POINTS),
}
ANY, SHARE = Interval(-math.inf, math.inf), Interval(0.0, 1.0)
POSSIBLE = {"final_exact": SHARE, "backward_transfer_exact": Interval(-1.0, 1.0)}


class OverSeeds(BaseModel):
    """The figures of T targets over seeds. `losses`, `exact`: T+1 stages by T targets; `figures` by names of LINES."""

    model_config = ConfigDict(frozen=True)

    targets: tuple[str, ...]
    seeds: int
    losses: tuple[Row, ...]
    exact: tuple[Row, ...]
    figures: dict[str, Figure]
    definition: str = DEFINITION


class Cells(NamedTuple):
    """The R matrix of one seed with intervals over held-out rows: of the loss itself, and of the share exact."""

    losses: list[list[Figure]]
    exact: list[list[Figure]]


def over_repeats(store: Store, measured: Sequence[Measured], retained: Sequence[Retention]) -> OverSeeds:
    """Return the figures over seeds: one measurement and its `Retention` for each."""
    cells = [_cells(store, seed) for seed in measured]
    each = [_figures(*seed) for seed in zip(cells, retained, strict=True)]
    shared = [name for name in LINES if all(name in seed for seed in each)]
    return OverSeeds(
        targets=retained[0].losses.targets,
        seeds=len(retained),
        losses=_over([seed.losses for seed in cells]),
        exact=_over([seed.exact for seed in cells], SHARE),
        figures={name: _mean([seed[name] for seed in each], POSSIBLE.get(name, ANY)) for name in shared},
    )


def _over(matrices: Sequence[list[list[Figure]]], possible: Interval = ANY) -> tuple[Row, ...]:
    rows = zip(*matrices, strict=True)
    return tuple(tuple(_mean(cell, possible) for cell in zip(*row, strict=True)) for row in rows)


def _mean(seeds: Sequence[Figure], possible: Interval) -> Figure:
    """Return the figure over seeds, with the interval cut to `possible` values."""
    return over_seeds(seeds).within(*possible)


def _cells(store: Store, measured: Measured) -> Cells:
    found = [[_cell(store, scores) for scores in row] for row in measured.scored]
    return Cells(*([[cell[kind] for cell in row] for row in found] for kind in (0, 1)))


def _cell(store: Store, scores: Artifact) -> tuple[Figure, Figure]:
    responses = table(store, scores, "responses")
    is_exact = (responses["correct"] == responses["count"]).to_numpy()
    loss = mean_per_token(responses["nll"].to_numpy(), responses["count"].to_numpy(), seed=0)
    return loss, share_of(is_exact)


def _figures(cells: Cells, retention: Retention) -> dict[str, Figure]:
    last = retention.since_base[-1]
    found = {
        "final_exact": mean_of(cells.exact[-1], FRACTION),
        "final_loss": mean_of(cells.losses[-1], NATS),
        "backward_transfer_exact": retention.exact.backward_transfer,
        "backward_transfer": retention.losses.backward_transfer,
        "probe_kl": last.probe_kl and Figure.model_validate(last.probe_kl),
        "mean_forgetting": last.mean_forgetting and Figure.model_validate(last.mean_forgetting),
    }
    return {name: figure for name, figure in found.items() if figure}


def write_repeats_files(
    folder: Path, store: Store, title: str, notes: Sequence[str], repeats: Sequence[tuple[ReportSource, Measured]]
) -> tuple[OverSeeds, list[Path]]:
    """Write a page over all seeds and, in a folder for each, the page of its sequence; the first is the page over all.

    Raises BadInput where the store lacks an artifact.
    """
    names = [slug(kept.title) for kept, _ in repeats]
    written = [write_sequence_files(folder / n, store, *one) for n, one in zip(names, repeats, strict=True)]
    found = over_repeats(store, [measured for _, measured in repeats], [retention for retention, _ in written])
    page, text, figures = (folder / name for name in ("report.html", "continual.md", "continual.json"))
    shown = _shown(title, notes, found)
    write_page(
        page, "repeats.html.j2", pages=[(kept.title, n) for (kept, _), n in zip(repeats, names, strict=True)], **shown
    )
    text.write_text(rendered("repeats.md.j2", **shown))
    write_json(figures, found.model_dump(mode="json"))
    write_json(folder / REPEATS, {"schema": SCHEMA, "title": title, "notes": list(notes), "folders": names})
    return found, [page, text, figures, *(path for _, files in written for path in files[:1])]


def described_repeats(title: str, notes: Sequence[str], found: OverSeeds) -> str:
    """Return the figures over seeds as Markdown."""
    return rendered("repeats.md.j2", **_shown(title, notes, found))


def _shown(title: str, notes: Sequence[str], found: OverSeeds) -> dict[str, object]:
    content = found.model_dump()
    lines = [(LINES[name], figure) for name, figure in content["figures"].items()]
    return {
        "title": title, "notes": notes, "lines": lines, "stages": stages_of(found.targets),
        **{name: content[name] for name in ("targets", "seeds", "losses", "exact", "definition")},
    }  # fmt: skip


class Repeats(BaseModel):
    """Which folders beside `repeats.json` hold the sequences of one page over seeds."""

    title: str
    notes: tuple[str, ...]
    folders: tuple[str, ...]


def read_repeats(folder: Path) -> tuple[Repeats, list[tuple[ReportSource, Measured]]] | None:
    """Return what the page over seeds in `folder` was made from; None where there is none. Raises BadInput."""
    if not (folder / REPEATS).is_file():
        return None
    repeats = read_part(folder / REPEATS, Repeats)
    parts = [folder / slug(name) for name in repeats.folders]
    return repeats, [(read_kept(part), measured) for part in parts if (measured := read_measured(part))]
