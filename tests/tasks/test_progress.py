"""How far a stage is, in Prefect: one artifact per stage on a real server, and no trouble where there is none."""

from typing import Any

import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from tasks.record import progress
from tasks.record.progress import progress_artifact


def steps(done: int) -> dict[str, Any]:
    return {"done": done, "total": 4, "unit": "steps"}


def test_one_artifact_follows_a_stage_to_its_end(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    seen = []

    def known() -> list[tuple[Any, str | None]]:
        with get_client(sync_client=True) as client:
            wanted = ArtifactFilter(key=ArtifactFilterKey(any_=["train-0123"]))
            return [(found.data, found.description) for found in client.read_artifacts(artifact_filter=wanted)]

    @task
    def train() -> None:
        with progress_artifact("train", "0123") as tell:
            seen.append(known())
            for done in (1, 2):
                tell(steps(done))
                seen.append(known())

    @flow
    def all_of_it() -> None:
        train()

    all_of_it()
    assert seen == [
        [],
        [(25.0, "train 0123: 1 of 4 steps")],
        [(50.0, "train 0123: 2 of 4 steps")],
    ]
    assert known() == [(100.0, "train 0123: done")]


def test_a_quick_stage_has_none_and_one_outside_a_task_neither(server: str) -> None:
    with progress_artifact("train", "4567") as tell:
        tell(steps(1))

    @flow
    def quick() -> None:
        @task
        def train() -> None:
            with progress_artifact("train", "4567") as tell:
                tell(steps(1))

        train()

    quick()
    with get_client(sync_client=True) as client:
        wanted = ArtifactFilter(key=ArtifactFilterKey(any_=["train-4567"]))
        assert client.read_artifacts(artifact_filter=wanted) == []
