"""The end of every story: figures, report, summary.json, and the same in MLflow and Prefect."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from prefect.artifacts import create_markdown_artifact, create_table_artifact

from cfsd.artifact import Store
from cfsd.machine import home
from cfsd.spec import digest_of
from cfsd.summary import Summary, Trail, summarise, write_summary
from tasks import record


def conclude(
    title: str, trails: list[Trail], run_ids: Sequence[str | None], notes: Sequence[str] = ()
) -> list[Summary]:
    """Write the report and summary.json of `trails`, and show both where people look."""
    from cfsd.figures import frontier_figure
    from cfsd.report import write_report
    from cfsd.table import summary_frame

    store, folder = Store(home()), report_folder(title, trails)
    folder.mkdir(parents=True, exist_ok=True)
    summaries = [summarise(store, trail, trails) for trail in trails]
    files = [folder / name for name in ("report.html", "summary.json", "frontier.png", "trails.json")]
    write_report(files[0], store, title, trails, summaries, list(notes))
    write_summary(files[1], summaries)
    frontier_figure(summaries).savefig(files[2], dpi=150)
    files[3].write_text(json.dumps([trail.model_dump(mode="json") for trail in trails], indent=1))
    for run_id in run_ids:
        record.conclusion(run_id, summaries[0] if len(summaries) == 1 else None, files[:3])
    frame = summary_frame(summaries)
    key = _slug(title)
    create_table_artifact(table=json.loads(frame.to_json(orient="records")), key=f"{key}-table")
    create_markdown_artifact(_markdown(title, summaries), key=f"{key}-result")
    return summaries


def conclude_corpus(title: str, trails: list[Trail], run_id: str | None) -> Path:
    """Write the page that shows the corpora of `trails`, and the trails themselves, which lead to every row."""
    from cfsd.corpus_page import write_corpus_page

    folder = report_folder(title, trails)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / name for name in ("corpus.html", "trails.json")]
    write_corpus_page(files[0], Store(home()), title, {trail.name: trail.artifacts for trail in trails})
    files[1].write_text(json.dumps([trail.model_dump(mode="json") for trail in trails], indent=1))
    record.conclusion(run_id, None, files[:1])
    return files[0]


def report_folder(title: str, trails: Sequence[Trail]) -> Path:
    """Return where the report lies: by name and by what was run, so that no run takes another one's place."""
    run = digest_of([trail.model_dump(mode="json", exclude={"steps"}) for trail in trails])
    return home() / "reports" / f"{_slug(title)}-{run[:8]}"


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "run"


def _markdown(title: str, summaries: list[Summary]) -> str:
    lines = [f"# {title}", ""]
    for summary in summaries:
        lines.append(f"## {summary.name}")
        lines += [f"* {name}: {value:.4g}" for name, value in record.headline(summary).items()]
    return "\n".join(lines)
