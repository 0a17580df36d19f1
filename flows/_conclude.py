"""The end of every story: figures, report, summary.json, and the same in MLflow and Prefect."""

import json
from collections.abc import Sequence
from pathlib import Path

from prefect.artifacts import create_markdown_artifact, create_table_artifact

from cfsd.artifact import Store
from cfsd.machine import home
from cfsd.spec import digest_of
from cfsd.summary import Summary, Trail
from tasks import record


def conclude(
    title: str, trails: list[Trail], run_ids: Sequence[str | None], notes: Sequence[str] = ()
) -> list[Summary]:
    """Write the report, summary.json and the model cards of `trails`, and show them where people look."""
    from cfsd.report_files import Kept, slug, write_files
    from cfsd.table import summary_frame

    kept = Kept(title=title, notes=tuple(notes), trails=tuple(trails))
    summaries, files = write_files(report_folder(title, trails), Store(home()), kept)
    for run_id in run_ids:
        record.conclusion(run_id, summaries[0] if len(summaries) == 1 else None, files)
    frame = summary_frame(summaries)
    key = slug(title)
    create_table_artifact(table=json.loads(frame.to_json(orient="records")), key=f"{key}-table")
    create_markdown_artifact(_markdown(title, summaries), key=f"{key}-result")
    return summaries


def conclude_corpus(title: str, trails: list[Trail], run_id: str | None) -> Path:
    """Write the page that shows the corpora of `trails`, and the trails themselves, which lead to every row."""
    from cfsd.report_files import Kept, write_corpus_files

    kept = Kept(title=title, trails=tuple(trails))
    page = write_corpus_files(report_folder(title, trails), Store(home()), kept)
    record.conclusion(run_id, None, [page])
    return page


def report_folder(title: str, trails: Sequence[Trail]) -> Path:
    """Return where the report lies: by name and by what was run, so that no run takes another one's place."""
    from cfsd.report_files import slug

    run = digest_of([trail.model_dump(mode="json", exclude={"steps"}) for trail in trails])
    return home() / "reports" / f"{slug(title)}-{run[:8]}"


def _markdown(title: str, summaries: list[Summary]) -> str:
    from cfsd.verdict import remarks, two_sentences, warnings

    lines = [f"# {title}", "", " ".join(two_sentences(summaries)), ""]
    lines += [f"* {line}" for line in (*remarks(summaries), *warnings(summaries))]
    for summary in summaries:
        lines += ["", f"## {summary.name}"]
        lines += [f"* {name}: {value:.4g}" for name, value in record.headline(summary).items()]
    return "\n".join(lines)
