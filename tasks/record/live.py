"""A stage that executes, followed live: progress on the terminal and, for GPU stages, an MLflow run of its own."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cfsd.store.artifact import ERROR, LOG, Draft
from cfsd.store.journal import METRICS, PROGRESS, whole_lines
from tasks.record.client import console, say, tracked
from tasks.record.progress import progress_artifact
from tasks.record.runs import describe, ended, open_step
from tasks.record.step_run import StepRun
from tasks.record.variants import current_variant

POLL_SECONDS = 1.0
SAY_SECONDS = 30.0  # between two lines of progress where no bar can be drawn


@contextmanager
def step(stage: str, key: str, draft: Draft, inputs: Mapping[str, Any], *, gpu: bool) -> Iterator[None]:
    """Follow a stage that really executes: progress for people and, for GPU steps, a live child run."""
    variant, run_id, taken = current_variant.get(), None, StepRun(stage, key, inputs)
    if gpu and variant and variant.run_id:
        attempt = "resumed" if draft.continued else "first"
        run_id = tracked(lambda server: open_step(server, taken, str(variant.run_id), attempt))
    say(f"{stage} {key}" + (" continues" if draft.continued else ""))
    with (
        ended(run_id),
        _why(run_id, draft.folder),
        _system_metrics(run_id),
        progress_artifact(stage, key) as tell,
        Follower(draft.folder, stage, console, _sender(run_id), tell),
    ):
        if run_id:
            tracked(lambda server: describe(server, run_id, taken, draft.store))
        yield


@contextmanager
def _why(run_id: str | None, folder: Path) -> Iterator[None]:
    """Keep on the run of a step that fails what it wrote on that."""
    try:
        yield
    except BaseException:
        for name in (ERROR, LOG):
            if run_id and (folder / name).is_file():
                tracked(lambda server, path=str(folder / name): server.log_artifact(run_id, path))  # type: ignore[misc]
        raise


@contextmanager
def _system_metrics(run_id: str | None) -> Iterator[None]:
    monitor = tracked(lambda server: server.monitor(run_id)) if run_id else None
    if monitor is None:
        yield
        return
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


def _sender(run_id: str | None) -> Callable[[list[dict[str, Any]]], None]:
    def send(records: list[dict[str, Any]]) -> None:
        if run_id:
            tracked(lambda server: server.log_metrics(run_id, records))

    return send


class Follower:
    """A thread that reads a draft's metrics.jsonl and progress.json until it is left."""

    def __init__(
        self, folder: Path, stage: str, console: Console, send: Callable[[list[dict[str, Any]]], None],
        tell: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> None:  # fmt: skip
        """Follow `folder`; `send` gets new metric records in order, `tell` how far the stage is, every second."""
        self.folder, self.stage, self.console, self.send, self.tell = folder, stage, console, send, tell
        self.offset = 0
        self.said = time.monotonic()
        self.left = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.bar: Progress | None = None

    def __enter__(self) -> "Follower":
        """Begin to follow."""
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Send what is left and end."""
        self.left.set()
        self.thread.join()
        if kind is None:
            self._send_new()

    def _run(self) -> None:
        columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(),
                   TextColumn("{task.fields[unit]}"), TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            line = bar.add_task(self.stage, total=None, unit="")
            while not self.left.wait(POLL_SECONDS):
                self._send_new()
                if progress := self._progress():
                    bar.update(line, completed=progress["done"], total=progress["total"], unit=progress["unit"])
                    self._say(progress)
                    self.tell(progress)

    def _progress(self) -> dict[str, Any] | None:
        try:
            progress: dict[str, Any] = json.loads((self.folder / PROGRESS).read_text())
        except FileNotFoundError:
            return None
        return progress

    def _say(self, progress: dict[str, Any]) -> None:
        if self.console.is_terminal or time.monotonic() - self.said < SAY_SECONDS:
            return
        self.said = time.monotonic()
        self.console.print(f"  {self.stage}: {progress['done']} of {progress['total']} {progress['unit']}")

    def _send_new(self) -> None:
        path = self.folder / METRICS
        if not path.exists():
            return
        if path.stat().st_size < self.offset:
            self.offset = 0  # a resumed training cut the file back to its checkpoint
        with path.open() as file:
            file.seek(self.offset)
            text = file.read()
        whole = text[: text.rfind("\n") + 1]
        self.offset += len(whole.encode())
        if records := list(whole_lines(whole.splitlines(keepends=True))):
            self.send(records)
