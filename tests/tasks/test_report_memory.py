"""A report is computed and drawn once: again only after a step was executed, the code changed, or a file is gone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cfsd.report.compared import Compared, Comparisons
from cfsd.report.place import RUN_RECORDS
from cfsd.report.run_record import RunRecord, Step
from cfsd.report.summary import Summary, write_summary
from cfsd.store.artifact import Artifact
from cfsd.store.digests import write_json
from tasks import _report_memory
from tasks import report as reports

FIGURE = {"value": 0.5, "low": 0.25, "high": 0.75, "unit": "nats/token"}
Write = Callable[..., reports.Report]


def run_record(*, executed: bool) -> RunRecord:
    artifact = Artifact(kind="model", key="0123456789abcdef", content="c", metadata={"rows": 1})
    step = Step(stage="train", artifact=artifact, executed=executed, seconds=2.0)
    return RunRecord(name="one", artifacts={"tuned": artifact}, steps=(step,))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders whose report was computed and drawn."""
    folders = []

    def write(folder: Path, title: str, run_records: list[RunRecord], notes: Any) -> reports.Report:
        folder.mkdir(exist_ok=True)
        folders.append(folder)
        summary = Summary(
            name="one", digest="", target_gain=FIGURE, target_accuracy_gain=None, target={"base_loss": 1.0},
            probe_kl=FIGURE, probe_kl_sampled=None, mean_forgetting=None, benchmarks={}, seconds={"train": 2.0},
            executed=["train 0123456789abcdef"], cached=[],
        )  # fmt: skip
        entry = Compared(
            one="one", other="two", measure="probe_kl", unit="nats/token", value=0.1, low=None, high=0.2,
            p_value=None, adjusted_p=0.01, seeds=1, paired=True,
        )  # fmt: skip
        write_summary(folder / "summary.json", [summary], [entry])
        write_json(folder / RUN_RECORDS, {"schema": 1, "title": title, "notes": [], "run_records": []})
        (folder / "report.html").write_text("page")
        files = [folder / "report.html", folder / "summary.json"]
        return reports.Report([summary], Comparisons([entry]), {"probe_kl": 0.5}, files, "text", "verdict", run_records)

    monkeypatch.setattr(reports, "_write_report", write)
    return folders


def test_what_lies_there_is_read_with_what_this_run_executed(drawn: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "report"
    first = reports.write_report(folder, "title", [run_record(executed=True)], ["a note"])
    again = reports.write_report(folder, "title", [run_record(executed=False)], ["a note"])
    assert len(drawn) == 1
    assert again.comparisons.entries == first.comparisons.entries and again.files == first.files
    assert (again.figures, again.text, again.verdict) == (first.figures, first.text, first.verdict)
    (summary,) = again.summaries
    assert summary == first.summaries[0].model_copy(update={"executed": [], "cached": ["train 0123456789abcdef"]})
    written = json.loads((folder / "summary.json").read_text())["variants"]["one"]
    assert written["executed"] == [] and written["cached"] == ["train 0123456789abcdef"]
    kept = json.loads((folder / RUN_RECORDS).read_text())
    assert kept["title"] == "title" and not kept["run_records"][0]["steps"][0]["executed"]


@pytest.mark.parametrize("change", ["executed", "code", "title", "note", "file", "half"])
def test_it_is_written_anew_where_it_could_say_something_else(
    change: str, drawn: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "report"
    reports.write_report(folder, "title", [run_record(executed=True)], [])
    if change == "code":
        monkeypatch.setattr(_report_memory, "_code", lambda: [["changed.py", 1, 2]])
    elif change == "file":
        (folder / "report.html").unlink()
    elif change == "half":
        memory = folder / _report_memory.MEMORY
        memory.write_text(memory.read_text()[:100])
    title, notes = ("other" if change == "title" else "title"), (["new"] if change == "note" else [])
    reports.write_report(folder, title, [run_record(executed=change == "executed")], notes)
    assert len(drawn) == 2
