"""The end of every story: figures, report, summary.json, and the same in MLflow and Prefect."""

import json
from collections.abc import Sequence
from pathlib import Path

from prefect.artifacts import create_markdown_artifact, create_table_artifact

from cfsd.machine import home
from cfsd.report.run_record import RunRecord
from cfsd.report.summary import Summary
from cfsd.spec import digest_of
from cfsd.store.artifact import Store
from tasks import record


def conclude(
    title: str, run_records: list[RunRecord], run_ids: Sequence[str | None], notes: Sequence[str] = ()
) -> list[Summary]:
    """Write the report, summary.json and the model cards of `run_records`, and show them where people look."""
    from cfsd.report.files import Kept, slug, write_files
    from cfsd.report.table import summary_frame

    kept = Kept(title=title, notes=tuple(notes), run_records=tuple(run_records))
    summaries, files = write_files(report_folder(title, run_records), Store(home()), kept)
    for run_id in run_ids:
        record.conclusion(run_id, summaries[0] if len(summaries) == 1 else None, files)
    frame = summary_frame(summaries)
    key = slug(title)
    create_table_artifact(table=json.loads(frame.to_json(orient="records")), key=f"{key}-table")
    create_markdown_artifact(_markdown(title, summaries), key=f"{key}-result")
    return summaries


def conclude_corpus(title: str, run_records: list[RunRecord], run_id: str | None) -> Path:
    """Write the page that shows the corpora of `run_records`, and the records, which lead to every row."""
    from cfsd.report.files import Kept, write_corpus_files

    kept = Kept(title=title, run_records=tuple(run_records))
    page = write_corpus_files(report_folder(title, run_records), Store(home()), kept)
    record.conclusion(run_id, None, [page])
    return page


def report_folder(title: str, run_records: Sequence[RunRecord]) -> Path:
    """Return where the report lies: by name and by what was run, so that no run takes another one's place."""
    from cfsd.report.files import slug

    run = digest_of([run_record.model_dump(mode="json", exclude={"steps"}) for run_record in run_records])
    return home() / "reports" / f"{slug(title)}-{run[:8]}"


def _markdown(title: str, summaries: list[Summary]) -> str:
    from cfsd.report.summarise import headline
    from cfsd.report.verdict import remarks, two_sentences, warnings

    lines = [f"# {title}", "", " ".join(two_sentences(summaries)), ""]
    lines += [f"* {line}" for line in (*remarks(summaries), *warnings(summaries))]
    for summary in summaries:
        lines += ["", f"## {summary.name}"]
        lines += [f"* {name}: {value:.4g}" for name, value in headline(summary).items()]
    return "\n".join(lines)
