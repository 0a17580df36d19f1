"""The end of a run: the figures that people compare, the files that they open, and what its description says."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from cfsd.machine import home
from cfsd.store.artifact import Store
from tasks.record.client import tracked
from tasks.record.description import NOTE, described
from tasks.record.pages import prefect_tags
from tasks.record.step_run import data_set
from tasks.record.variants import current_variant, runs_of
from tasks.report import Report

if TYPE_CHECKING:
    from tasks.record.server import Server

INPUTS = ("base", "target", "probe", "selected_corpus")  # roles of a variant that are its data sets


def conclusion(
    run_id: str | None,
    figures: Mapping[str, float],
    files: Sequence[Path],
    *,
    report: Report | None = None,
    verdict: str = "",
) -> None:
    """Put figures, files and what a report says on a variant's or a comparison's run; with a report, on its scores'.

    `verdict` is the gate's, which stands above all else in the description.
    """
    if run_id is None:
        return
    tracked(lambda server: _upload(server, run_id, files))
    tracked(lambda server: _conclude(server, run_id, figures, report, verdict))


def _upload(server: "Server", run_id: str, files: Sequence[Path]) -> None:
    """Send files in one request."""
    with TemporaryDirectory() as folder:
        for file in files:
            shutil.copyfile(file, Path(folder) / file.name)
        server.log_artifacts(run_id, folder)


def _conclude(server: "Server", run_id: str, figures: Mapping[str, float], report: Report | None, verdict: str) -> None:
    tags, model = dict[str, str](), None
    variant = current_variant.get()
    if report:
        from tasks.record.against_base import log_shown, model_of, note_scores

        if variant and variant.run_id == run_id:
            runs_of(server, variant)
            data_sets = [data_set(Store(home()), role, a) for role, a in report.run_records[0].artifacts.items()]
            server.log_data_sets(run_id, [d for d in data_sets if d.context in INPUTS])
        tags = report.tags | log_shown(server, run_id, report) | {NOTE: _told(server, run_id, report)}
        if model := model_of(server, run_id, report):
            server.link_model(run_id, model)
        note_scores(server, report)
    if verdict:
        known = server.get_run(run_id).data.tags.get(NOTE, "")
        tags |= {"cfsd.verdict": verdict, NOTE: described(f"**{verdict}**", known)}
    if variant and variant.run_id == run_id:
        variant.told = tags.pop(NOTE, "")  # goes above its steps
    server.log_all(run_id, figures=figures, tags=tags, model=model)


def _told(server: "Server", run_id: str, report: Report) -> str:
    """Return the verdict, links and the table as Markdown; MLflow shows the first two lines of it unfolded."""
    links = [f"[report]({server.page(run_id, f'/artifacts/{report.files[0].name}')})"] if report.files else []
    if url := prefect_tags().get("cfsd.prefect_url"):
        links.append(f"[flow run in Prefect]({url})")
    _, *parts = report.text.split("\n\n")
    return described(*parts[:1], " · ".join(links), *parts[1:])
