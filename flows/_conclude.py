"""The end of every pipeline: figures, report, summary.json, and the same in MLflow and Prefect."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from prefect.artifacts import create_link_artifact, create_markdown_artifact

from cfsd.machine import home
from cfsd.report.compared import NOTHING, Comparisons
from cfsd.report.place import report_folder, slug
from cfsd.report.run_record import RunRecord
from cfsd.report.summary import Summary
from cfsd.store.artifact import Store
from flows._cli import console
from flows._reports import report_url
from tasks import record
from tasks.report import print_figures, write_report


class Result(NamedTuple):
    """What a flow returns: run records, their figures, the report's folder, how variants differ, and the verdict."""

    run_records: list[RunRecord]
    summaries: list[Summary]
    folder: Path
    comparisons: Comparisons = NOTHING
    verdict: str = ""

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
    links = link(title, folder, run_ids)
    beside = " · ".join(f"[{words}]({address})" for words, address in links.items())
    said = "\n\n".join(filter(None, (report.verdict, beside)))  # on the run's own page, of which it is a card
    create_markdown_artifact(f"{report.text}\n\n{beside}", key=f"{slug(title)}-result", description=said)
    return Result(run_records, report.summaries, folder, report.comparisons, report.verdict)


def link(title: str, folder: Path, run_ids: Sequence[str | None]) -> dict[str, str]:
    """Put links to the report and to MLflow's run on the flow run, and return them; without a server there is none."""
    places = {"report": report_url(folder), "run in MLflow": record.run_url(run_ids[0] if run_ids else None)}
    links = {words: address for words, address in places.items() if address}
    for words, address in links.items():
        key = f"{slug(title)}-{slug(words.rpartition(' ')[2])}"
        create_link_artifact(address, words, key=key, description=f"[{words}]({address})")
    return links


def show(result: Result) -> None:
    """Print the table of figures and where the files are."""
    print_figures(result.summaries, result.comparisons, console)
    show_files(result)


def show_files(result: Result) -> None:
    """Print where the last model and the report are, how to open the pages and, last, the path of summary.json."""
    final = result.run_records[-1].artifacts["final"]
    console.print(f"{final.kind:<8} {Store(home()).whereabouts(final)}")
    console.print(f"report   {result.folder / 'report.html'}")
    url = report_url(result.folder)
    console.print(f"         {url}" if url else "compare runs in the browser (Prefect and MLflow): make up")
    print(result.folder / "summary.json", flush=True)
