"""The end of every pipeline: figures, report, summary.json, and the same in MLflow and Prefect."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from prefect.artifacts import create_markdown_artifact, create_table_artifact

from cfsd.machine import home
from cfsd.report.compared import NOTHING, Comparisons
from cfsd.report.place import report_folder, slug
from cfsd.report.run_record import RunRecord
from cfsd.report.summary import Summary
from cfsd.store.artifact import Store
from flows._cli import console
from tasks import record
from tasks.report import print_figures, write_report


class Result(NamedTuple):
    """What a flow returns: its run records, their figures, the folder of the report, and how variants differ."""

    run_records: list[RunRecord]
    summaries: list[Summary]
    folder: Path
    comparisons: Comparisons = NOTHING

    def only(self) -> RunRecord:
        """Return the run record of a flow that runs one recipe."""
        (run_record,) = self.run_records
        return run_record


def conclude(
    title: str, run_records: list[RunRecord], run_ids: Sequence[str | None], notes: Sequence[str] = ()
) -> Result:
    """Write the report, summary.json and the model cards of `run_records`, and show them where people look."""
    folder = report_folder(home(), title, run_records)
    report = write_report(folder, title, run_records, notes)
    for run_id in run_ids:
        record.conclusion(run_id, report.figures, report.files, report=report)
    create_table_artifact(table=report.table, key=f"{slug(title)}-table")
    create_markdown_artifact(report.text, key=f"{slug(title)}-result")
    return Result(run_records, report.summaries, folder, report.comparisons)


def show(result: Result) -> None:
    """Print the table of figures and where the files are."""
    print_figures(result.summaries, result.comparisons, console)
    show_files(result)


def show_files(result: Result) -> None:
    """Print where the last model and the report are, how to open the pages and, last, the path of summary.json."""
    console.print(f"model    {Store(home()).path(result.run_records[-1].artifacts['final'])}")
    console.print(f"report   {result.folder / 'report.html'}")
    console.print("compare runs in the browser (Prefect and MLflow): make up")
    print(result.folder / "summary.json", flush=True)
