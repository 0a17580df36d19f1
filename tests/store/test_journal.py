"""Progress that others read: the first and the last are there, and those between as often as anyone looks."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cfsd.store import journal
from cfsd.store.journal import METRICS, PROGRESS, Journal, read_metrics
from tasks.record.live import Follower


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


def test_a_line_that_a_crash_cut_short_costs_that_line(tmp_path: Path) -> None:
    own = Journal(tmp_path)
    own.metrics(1, {"loss": 2.0})
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"time": 17960149')
    Journal(tmp_path).metrics(2, {"loss": 1.0})
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    sent: list[Any] = []
    with Follower(tmp_path, "train", Console(quiet=True), sent.extend):
        pass
    assert [record["step"] for record in sent] == [1, 2]


def test_each_draft_has_its_own_pace(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        Journal(tmp_path / name).progress(1, 9, "rows")
        assert json.loads((tmp_path / name / PROGRESS).read_text()) == {"done": 1, "total": 9, "unit": "rows"}
