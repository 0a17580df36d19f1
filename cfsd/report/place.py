"""Where the report of a run lies."""

import re
from collections.abc import Sequence
from pathlib import Path

from cfsd.report.run_record import RunRecord
from cfsd.spec import digest_of

RUN_RECORDS = "run_records.json"  # what a report is made from, beside it
LONGEST = 100


def report_folder(home: Path, title: str, run_records: Sequence[RunRecord]) -> Path:
    """Return the folder below `home`: by name and by what was run, so that no run takes another one's place."""
    run = digest_of([run_record.model_dump(mode="json", exclude={"steps"}) for run_record in run_records])
    return home / "reports" / f"{slug(title)}-{run[:8]}"


def slug(title: str, empty: str = "run") -> str:
    """Return `title` as it may stand in the name of a file, a folder or a Prefect artifact; `empty` if nothing may.

    It has at most 100 characters: a file's name may have 255 with what is put around it.
    """
    return re.sub(r"[^a-z0-9]+", "-", title.lower())[:LONGEST].strip("-") or empty
