"""A report that lies there already: what it says is read again, not computed and drawn again.

Its folder is named by what was run. If nothing was executed this time, and the code of `cfsd` is the same, only which
steps were executed differs; that is brought up to date in summary.json and run_records.json. Its page keeps telling of
the run that made it.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import cfsd
from cfsd.report.compared import Compared, Comparisons
from cfsd.report.place import RUN_RECORDS
from cfsd.report.run_record import RunRecord
from cfsd.report.summary import Summary, write_summary
from cfsd.spec import digest_of
from cfsd.statistics.matched_gain import MatchedGain
from cfsd.store.digests import write_json

MEMORY = ".report.json"


def stamp_of(title: str, notes: Sequence[str], run_records: Sequence[RunRecord]) -> str:
    """Return the digest of all that a report says but which steps were executed."""
    made = [run_record.model_dump(mode="json") for run_record in run_records]
    for step in (step for run_record in made for step in run_record["steps"]):
        del step["executed"]
    return digest_of([_code(), title, list(notes), made])


@cache
def _code() -> list[list[Any]]:
    """Return name, size and time of every file of the package, which tell a changed one."""
    root = Path(cfsd.__file__).parent
    files = sorted(path for path in root.rglob("*") if path.suffix in (".py", ".j2", ".css", ".js"))
    return [[str(path.relative_to(root)), (status := path.stat()).st_size, status.st_mtime_ns] for path in files]


def remember(folder: Path, stamp: str, report: dict[str, Any]) -> None:
    """Keep the fields of a report beside its files."""
    found: Comparisons = report["comparisons"]
    plain = {name: value for name, value in report.items() if name != "run_records"}
    write_json(folder / MEMORY, {"stamp": stamp, **plain} | {
        "summaries": [summary.model_dump(mode="json") for summary in report["summaries"]],
        "comparisons": [entry.model_dump(mode="json") for entry in found.entries],
        "matched": [entry.model_dump(mode="json") for entry in found.matched],
        "files": [file.name for file in report["files"]],
    })  # fmt: skip


def remembered(folder: Path, stamp: str, run_records: Sequence[RunRecord]) -> dict[str, Any] | None:
    """Return the fields of the report in `folder`; None where it is another one, or a step was executed."""
    if any(step.executed for run_record in run_records for step in run_record.steps):
        return None
    try:
        known = json.loads((folder / MEMORY).read_bytes())
        files = [folder / name for name in known["files"]]
        if known.pop("stamp") != stamp or not all(file.is_file() for file in [*files, folder / RUN_RECORDS]):
            return None
        entries = [Compared.model_validate(entry) for entry in known["comparisons"]]
        matched = [MatchedGain.model_validate(entry) for entry in known.pop("matched")]
        summaries = [Summary.model_validate(summary) for summary in known["summaries"]]
    except (OSError, ValueError, KeyError, TypeError):  # none, or half of one
        return None
    summaries = [_nothing_executed(summary, of) for summary, of in zip(summaries, run_records, strict=True)]
    write_summary(folder / "summary.json", summaries, entries, matched)
    kept = json.loads((folder / RUN_RECORDS).read_bytes())
    kept["run_records"] = [run_record.model_dump(mode="json") for run_record in run_records]
    write_json(folder / RUN_RECORDS, kept)
    made = {"summaries": summaries, "comparisons": Comparisons(entries, matched), "files": files}
    return {**known, **made, "run_records": list(run_records)}


def _nothing_executed(summary: Summary, run_record: RunRecord) -> Summary:
    cached = [f"{step.stage} {step.artifact.key}" for step in run_record.steps]
    return summary.model_copy(update={"executed": [], "cached": cached})
