"""Progress that others read: the first and the last are there, and those between as often as anyone looks."""

import json
from pathlib import Path

import pytest

from cfsd.store import journal
from cfsd.store.journal import PROGRESS, Journal


def test_of_progress_in_quick_succession_the_first_and_the_last_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, seen = [100.0], []
    monkeypatch.setattr(journal.time, "monotonic", lambda: now[0])
    own = Journal(tmp_path)
    for done in range(1, 101):
        own.progress(done, 100, "rows")
        seen.append(json.loads((tmp_path / PROGRESS).read_text())["done"])
        now[0] += journal.EVERY / 8
    assert seen[0] == 1 and seen[-1] == 100
    assert sorted(set(seen)) == [1, *range(9, 100, 8), 100]  # each eighth one
    assert [file.name for file in tmp_path.iterdir()] == [PROGRESS]


def test_each_draft_has_its_own_pace(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        Journal(tmp_path / name).progress(1, 9, "rows")
        assert json.loads((tmp_path / name / PROGRESS).read_text()) == {"done": 1, "total": 9, "unit": "rows"}
