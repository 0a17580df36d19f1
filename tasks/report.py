"""Reports, made from artifacts alone. The libraries that read tables and draw figures are imported late."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from cfsd.machine import home
from cfsd.report.compared import NOTHING, Comparisons
from cfsd.report.markdown import inert
from cfsd.report.run_record import Measured, RunRecord
from cfsd.report.summary import Summary
from cfsd.store.artifact import Store


class Report(NamedTuple):
    """What was written: figures, the whole run's by metric name, files, and the figures as table and Markdown."""

    summaries: list[Summary]
    comparisons: Comparisons
    figures: dict[str, float]
    files: list[Path]
    table: list[dict[str, Any]]
    text: str


def write_report(folder: Path, title: str, run_records: list[RunRecord], notes: Sequence[str]) -> Report:
    """Write the page, summary.json, the figure and the model cards of `run_records`; see `cfsd.report.files`."""
    from cfsd.report.differences import lines_against, metrics_of
    from cfsd.report.files import Kept, write_files
    from cfsd.report.summarise import headline
    from cfsd.report.table import summary_frame
    from cfsd.report.verdict import best, remarks, two_sentences, variants_of, warnings

    kept = Kept(title=title, notes=tuple(notes), run_records=tuple(run_records))
    (summaries, comparisons), files = write_files(folder, Store(home()), kept)
    lines = [f"# {title}", "", " ".join(two_sentences(summaries, comparisons)), ""]
    name = best(variants_of(summaries), comparisons).name
    beneath = (*remarks(summaries, comparisons), *warnings(summaries))
    lines += [f"* {line}" for line in (*lines_against(name, comparisons, only_found=False), *beneath)]
    figures = [headline(summary) for summary in summaries]
    for summary, flat in zip(summaries, figures, strict=True):
        lines += ["", f"## {summary.name}", *(f"* {name}: {value:.4g}" for name, value in flat.items())]
    table = json.loads(summary_frame(summaries).to_json(orient="records"))
    of_run = figures[0] if len(summaries) == 1 else metrics_of(comparisons)
    return Report(summaries, comparisons, of_run, files, table, inert("\n".join(lines)))


def write_corpus_page(folder: Path, title: str, run_records: list[RunRecord]) -> Path:
    """Write the page that shows the corpora of `run_records`, and the run records, which lead to every row."""
    from cfsd.report.files import Kept, write_corpus_files

    return write_corpus_files(folder, Store(home()), Kept(title=title, run_records=tuple(run_records)))


def write_sequence(folder: Path, title: str, run_records: list[RunRecord], measured: Measured) -> Report:
    """Write the page of targets trained in turn; see `cfsd.report.sequence`."""
    from cfsd.report.files import Kept
    from cfsd.report.sequence.files import described_sequence, write_sequence_files

    kept = Kept(title=title, run_records=tuple(run_records))
    remains, files = write_sequence_files(folder, Store(home()), kept, measured)
    return Report([], NOTHING, {}, files, [], described_sequence(title, remains))


def rewrite(folder: Path, to: Path) -> list[Path]:
    """Write the report in `folder` of any flow again, into `to`, and return the files. Raises BadInput."""
    from cfsd.report.files import only_corpora, read_kept, write_corpus_files, write_files
    from cfsd.report.sequence.files import read_measured, write_sequence_files

    kept, store = read_kept(folder), Store(home())
    if measured := read_measured(folder):
        return write_sequence_files(to, store, kept, measured)[1]
    return [write_corpus_files(to, store, kept)] if only_corpora(kept) else write_files(to, store, kept)[1]


def export_model(folder: Path, to: Path, variant: str | None) -> None:
    """Copy a model of the report in `folder` to `to`, with its card; see `cfsd.report.export`. Raises BadInput."""
    from cfsd.report.export import chosen, export
    from cfsd.report.files import read_kept

    kept = read_kept(folder)
    export(Store(home()), kept, chosen(kept, variant), to)


def print_figures(summaries: list[Summary], comparisons: Comparisons, console: Console) -> None:
    """Print the table of figures and the verdict; see `cfsd.report.terminal`."""
    from cfsd.report.terminal import print_summary

    print_summary(summaries, console, comparisons)
