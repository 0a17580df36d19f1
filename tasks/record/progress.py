"""How far a long stage is, as one artifact of its flow run in Prefect, which is brought up to date while it works."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.context import TaskRunContext
from prefect.exceptions import PrefectHTTPStatusError

EVERY_SECONDS = 5.0  # between two updates, and before the first: shorter stages need none
AWAY = (httpx.HTTPError, PrefectHTTPStatusError)  # progress is no reason to end a stage


@contextmanager
def progress_artifact(stage: str, key: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Give a function that takes what progress.json holds (done, total, unit), from any thread, as often as it likes.

    Within a task; elsewhere the function does nothing.
    """
    context = TaskRunContext.get()
    if context is None:
        yield lambda _: None
        return
    artifact = _Artifact(f"{stage}-{key}", f"{stage} {key}", context.task_run.flow_run_id, context.task_run.id)
    yield artifact.tell
    artifact.finish()


class _Artifact:
    """The artifact, from its first update on; Prefect's client is made here, where the settings of the run hold."""

    def __init__(self, key: str, name: str, flow_run_id: UUID | None, task_run_id: UUID) -> None:
        self.key, self.name, self.flow_run_id, self.task_run_id = key, name, flow_run_id, task_run_id
        self.client = get_client(sync_client=True)
        self.last = time.monotonic()
        self.artifact_id: UUID | None = None

    def tell(self, progress: dict[str, Any]) -> None:
        if not progress["total"] or time.monotonic() - self.last < EVERY_SECONDS:
            return
        self.last = time.monotonic()
        text = f"{self.name}: {progress['done']} of {progress['total']} {progress['unit']}"
        self._write(100.0 * progress["done"] / progress["total"], text)

    def finish(self) -> None:
        if self.artifact_id is not None:
            self._write(100.0, f"{self.name}: done")

    def _write(self, percent: float, text: str) -> None:
        with suppress(*AWAY):
            if self.artifact_id is not None:
                self.client.update_artifact(self.artifact_id, ArtifactUpdate(data=percent, description=text))
                return
            made = ArtifactCreate(
                key=self.key, type="progress", description=text, data=percent, flow_run_id=self.flow_run_id,
                task_run_id=self.task_run_id,
            )  # fmt: skip
            self.artifact_id = self.client.create_artifact(made).id
