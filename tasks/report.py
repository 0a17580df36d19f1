"""Reports, made from artifacts alone. The libraries that read tables and draw figures are imported late."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from cfsd.integrations import Format
from cfsd.machine import home
from cfsd.report.compared import NOTHING, Comparisons
from cfsd.report.markdown import cell, inert
from cfsd.report.run_record import Measured, RunRecord
from cfsd.report.summary import Summary
from cfsd.store.artifact import Store
from tasks._report_memory import remember, remembered, stamp_of


class Report(NamedTuple):
    """What was written: figures, the whole run's by metric name, files, and the same as Markdown.

    `text` is a title, the verdict and the table; `tags`: outcomes that are no numbers.
    """

    summaries: list[Summary]
    comparisons: Comparisons
    figures: dict[str, float]
    files: list[Path]
    text: str
    verdict: str = ""
    run_records: list[RunRecord] = []
    tags: dict[str, str] = {}


def write_report(folder: Path, title: str, run_records: list[RunRecord], notes: Sequence[str]) -> Report:
    """Write the page, summary.json, the figure and the model cards of `run_records`, unless they lie there already."""
    stamp = stamp_of(title, notes, run_records)
    if known := remembered(folder, stamp, run_records):
        return Report(**known)
    report = _write_report(folder, title, run_records, notes)
    remember(folder, stamp, report._asdict())
    return report


def _write_report(folder: Path, title: str, run_records: list[RunRecord], notes: Sequence[str]) -> Report:
    """Write all files and return what they say; see `cfsd.report.files`."""
    from cfsd.report.differences import lines_against, metrics_of
    from cfsd.report.files import ReportSource, write_files
    from cfsd.report.summarise import headline
    from cfsd.report.verdict import best, remarks, two_sentences, variants_of, warnings

    kept = ReportSource(title=title, notes=tuple(notes), run_records=tuple(run_records))
    (summaries, comparisons), files = write_files(folder, Store(home()), kept)
    name, verdict = best(variants_of(summaries), comparisons).name, " ".join(two_sentences(summaries, comparisons))
    beneath = (*lines_against(name, comparisons, only_found=False), *remarks(summaries, comparisons))
    lines = inert("\n".join(f"* {line}" for line in (*beneath, *warnings(summaries))))
    said = [inert(f"# {title}"), inert(verdict), "\n".join(_markdown_table(summaries)), lines]
    alone = summaries[0] if len(summaries) == 1 else None
    figures = headline(alone) if alone else metrics_of(comparisons)
    outcomes = {"budget_outcome": alone.budget["outcome"]} if alone and alone.budget else {}
    text = "\n\n".join(part for part in said if part)
    return Report(summaries, comparisons, figures, files, text, inert(verdict), run_records, outcomes)


def _markdown_table(summaries: list[Summary]) -> list[str]:
    """Return the figures as the terminal shows them, a column per variant; nothing for no figures."""
    from cfsd.report.table import lines_of

    names = ["base", *(summary.name for summary in summaries)]
    rows = [[("&nbsp; " * line.is_part) + cell(line.label), line.base, *line.cells] for line in lines_of(summaries)]
    if not rows:
        return []
    head = [["", *map(cell, names)], ["---", *("--:" for _ in names)]]
    return [f"| {' | '.join(cells)} |" for cells in (*head, *rows)]


def judge_margin(folder: Path, summary: Summary, points: float) -> tuple[str, str]:
    """Write the verdict on two models beside their report, and return it; see `cfsd.report.margin`."""
    from cfsd.report.margin import write_verdict

    return write_verdict(folder, summary, points)


def write_corpus_page(folder: Path, title: str, run_records: list[RunRecord]) -> Path:
    """Write the page that shows the corpora of `run_records`, and the run records, which lead to every row."""
    from cfsd.report.files import ReportSource, write_corpus_files

    return write_corpus_files(folder, Store(home()), ReportSource(title=title, run_records=tuple(run_records)))


class InTurn(NamedTuple):
    """Targets that were trained in turn, once: the stages, and what was measured beside them."""

    title: str
    run_records: list[RunRecord]
    measured: Measured


def write_sequence(folder: Path, title: str, repeats: Sequence[InTurn], notes: Sequence[str]) -> Report:
    """Write the page of targets trained in turn, and of several repeats one over all; see `cfsd.report.sequence`."""
    from cfsd.report.files import ReportSource
    from cfsd.report.sequence.files import described_sequence, write_sequence_files
    from cfsd.report.sequence.repeats import described_repeats, write_repeats_files

    kept = [ReportSource(title=one.title, notes=tuple(notes), run_records=tuple(one.run_records)) for one in repeats]
    if len(kept) == 1:
        remains, files = write_sequence_files(folder, Store(home()), kept[0], repeats[0].measured)
        return Report([], NOTHING, {}, files, described_sequence(title, notes, remains))
    all_of_them = list(zip(kept, (one.measured for one in repeats), strict=True))
    found, files = write_repeats_files(folder, Store(home()), title, notes, all_of_them)
    figures = {name: figure.value for name, figure in found.figures.items()}
    return Report([], NOTHING, figures, files, described_repeats(title, notes, found))


def rewrite(folder: Path, to: Path) -> list[Path]:
    """Write the report in `folder` of any flow again, into `to`, and return the files. Raises BadInput."""
    from cfsd.report.files import only_corpora, read_kept, write_corpus_files, write_files
    from cfsd.report.sequence.files import read_measured, write_sequence_files
    from cfsd.report.sequence.repeats import read_repeats, write_repeats_files

    store = Store(home())
    if repeated := read_repeats(folder):
        known, sequences = repeated
        return write_repeats_files(to, store, known.title, known.notes, sequences)[1]
    kept = read_kept(folder)
    if measured := read_measured(folder):
        return write_sequence_files(to, store, kept, measured)[1]
    return [write_corpus_files(to, store, kept)] if only_corpora(kept) else write_files(to, store, kept)[1]


def export_model(folder: Path, to: Path, variant: str | None) -> None:
    """Copy a model of the report in `folder` to `to`, with its card; see `cfsd.report.export`. Raises BadInput."""
    from cfsd.report.export import chosen, export
    from cfsd.report.files import read_kept

    kept = read_kept(folder)
    export(Store(home()), kept, chosen(kept, variant), to)


def export_corpus(corpus: str, to: Path, form: Format, jsonl: bool) -> list[str]:
    """Write a corpus into `to` as another trainer reads it; see `cfsd.integrations.formats`. Raises BadInput."""
    from cfsd.integrations.formats import write_corpus

    return write_corpus(corpus, to, form, jsonl=jsonl)


def print_figures(summaries: list[Summary], comparisons: Comparisons, console: Console) -> None:
    """Print the table of figures and the verdict; see `cfsd.report.terminal`."""
    from cfsd.report.terminal import print_summary

    print_summary(summaries, console, comparisons)
