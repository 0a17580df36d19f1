"""Where the report of a run lies."""

import re
from collections.abc import Sequence
from pathlib import Path

from cfsd.report.run_record import RunRecord
from cfsd.spec import digest_of

RUN_RECORDS = "run_records.json"  # what a report is made from, beside it
LONGEST, MARK = 100, 6


def report_folder(home: Path, title: str, run_records: Sequence[RunRecord]) -> Path:
    """Return the folder below `home`: by name and by what was run, so that no run takes another one's place."""
    run = digest_of([run_record.model_dump(mode="json", exclude={"steps"}) for run_record in run_records])
    return home / "reports" / f"{slug(title)}-{run[:8]}"


def slug(title: str, empty: str = "run") -> str:
    """Return `title` as it may stand in the name of a file, a folder or a Prefect artifact; `empty` if nothing may.

    It has at most 100 characters: a file's name may have 255 with what is put around it. Where it is cut, or letters of
    other scripts are lost, a digest of the title ends it, so that titles keep places of their own.
    """
    text = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    if len(text) <= LONGEST and all(char.isascii() or not char.isalnum() for char in title):
        return text or empty
    mark = digest_of(title)[:MARK]
    return f"{text[: LONGEST - MARK - 1].strip('-') or empty}-{mark}"


def card_name(variant: str) -> str:
    """Return the name of the file of a variant's model card in the report's folder."""
    return f"model-card-{slug(variant)}.md"
