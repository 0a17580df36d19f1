"""What is known of scores only beside the base's: forgetting with its interval, and the answers that changed."""

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from cfsd.machine import home
from cfsd.report.changed_answers import Changed, changed_answers
from cfsd.report.measures import figure_of
from cfsd.report.run_record import RunRecord
from cfsd.report.shown import shown_answers
from cfsd.report.summary import Fig, Summary, with_bounds
from cfsd.stages import MERGE
from cfsd.store.artifact import Artifact, Store
from tasks.record.contents import TABLES
from tasks.record.step_run import StepRun
from tasks.report import Report

if TYPE_CHECKING:
    from tasks.record.server import Server

AGAINST = "cfsd.against"  # the tag of scores that hold their figures against the base: the content of the base's scores


class Finding(NamedTuple):
    """What scores of the tuned model say beside the base's: figures by name."""

    scores: Artifact
    against: str
    figures: dict[str, float]


def model_of(server: "Server", run_id: str, report: Report) -> str | None:
    """Return the logged model of a report on one trained model, made here if it was merged, which is no run."""
    models = {r.artifacts["final"].key: r.artifacts["final"] for r in report.run_records if "tuned" in r.artifacts}
    if len(models) != 1:
        return None
    (model,) = models.values()
    if (known := server.model_of(model)) is None:
        address = Store(home()).place(model).as_uri()
        server.log_model(run_id, StepRun(MERGE, model.key, {}), model, address, {})
        known = server.model_of(model)
    return known


def note_scores(server: "Server", report: Report) -> None:
    """Put on the runs of a tuned model's scores what it lost or learned against the base, with intervals, once."""
    for run_record, summary in zip(report.run_records, report.summaries, strict=True):
        open_ = [(found, known) for found in findings(run_record, summary) if (known := server.step(found.scores.key))]
        due = [(found, known.run_id) for found, known in open_ if known.tags.get(AGAINST) != found.against]
        if not due:
            continue
        changed = {c.benchmark: c for c in changed_answers(Store(home()), [run_record])[run_record.name]}
        for found, step_run in due:
            tags = {AGAINST: found.against}
            if answers := changed.get(str(found.scores.metadata.get("benchmark"))):
                tags |= _log_answers(server, step_run, answers)
            server.log_all(step_run, figures=found.figures, tags=tags)
            server.know(found.scores.key, step_run, tags)


def findings(run_record: RunRecord, summary: Summary) -> Iterator[Finding]:
    """Yield what a summary says of each table of scores of the tuned model."""
    before, after = run_record.before, run_record.after
    base = run_record.artifacts["base"].content
    for name, entry in summary.benchmarks.items():
        # no q_value: it is of all benchmarks of one report, and these scores may be in several
        numbers = {n: entry[n] for n in ("base", "tuned", "p_value") if entry.get(n) is not None}
        kept = with_bounds("retention", entry["retention"])
        figures = numbers | with_bounds("forgetting", entry["forgetting"]) | kept
        yield Finding(after.benchmarks[name], before.benchmarks[name].content, figures)
    for name, text in summary.texts.items():
        yield Finding(
            after.texts[name], before.texts[name].content, with_bounds("forgetting", text["per_token"]["forgetting"])
        )
    for name, prompts in summary.prompts.items():
        yield Finding(after.prompts[name], base, with_bounds("kl", prompts["kl"]))
    alone: list[tuple[Artifact | None, str, dict[str, Fig | None]]] = [
        (after.probe, base, {"probe_kl": summary.probe_kl}),
        (after.chat, base, {name: figure_of(summary, name) for name in ("chat_kl", "chat_user_kl")}),
        (after.target_divergence, base, {"target_divergence": summary.target_divergence}),
        (after.target, before.target.content if before.target else base,
         {"target_gain": summary.target_gain, "target_accuracy_gain": summary.target_accuracy_gain}),
    ]  # fmt: skip
    for scores, against, figures_of in alone:
        if scores:
            yield Finding(scores, against, {k: v for n, f in figures_of.items() for k, v in with_bounds(n, f).items()})


def log_shown(server: "Server", run_id: str, report: Report) -> dict[str, str]:
    """Send what base and variants answered to the same prompts as a table, a column per model; return as below."""
    sections = shown_answers(Store(home()), report.run_records)
    rows = [
        {"prompt": item.prompt or f"({item.label()})", "expected": item.expected}
        | {name or "base": answer.text() for name, answer in item.answers.items()}
        for section in sections for item in section.items
    ]  # fmt: skip
    return _log_table(server, run_id, "table-answers.json", rows) if rows else {}


def _log_answers(server: "Server", run_id: str, changed: Changed) -> dict[str, str]:
    return _log_table(server, run_id, "table-changed-answers.json", list(_rows(changed)), "table-scores.json")


def _log_table(
    server: "Server", run_id: str, name: str, rows: list[dict[str, Any]], *beside: str
) -> dict[str, str]:  # fmt: skip
    """Send rows as a table; return the tag by which the pages know the tables of the run, those `beside` it too."""
    with TemporaryDirectory() as folder:
        pd.DataFrame(rows).to_json(Path(folder) / name, orient="split", index=False)
        server.log_artifacts(run_id, folder)
    return {TABLES: json.dumps([{"path": path, "type": "table"} for path in (name, *beside)])}


def _rows(changed: Changed) -> Iterator[dict[str, Any]]:
    for direction in changed.directions:
        for item in direction.items:
            yield {
                "change": direction.words, "prompt": item.prompt, "right answer": item.right,
                "base": item.base.text, "tuned": item.tuned.text, "base was": item.base.mark,
                "tuned is": item.tuned.mark, "doc_id": item.doc_id,
            }  # fmt: skip
