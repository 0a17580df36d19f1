"""Runs of the command line that a test disturbs: forked from a process that has imported everything already."""

import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cfsd.store.artifact import MANIFEST

_fork = multiprocessing.get_context("forkserver")
_fork.set_forkserver_preload(
    ["tests.faults.runs", "flows.mitigate", "cfsd.evaluate.stage", "cfsd.generate.stage", "cfsd.report.files",
     "tasks.record.server"]
)  # fmt: skip
_settled = ExitStack()  # as long as the process lives
ON = ["--machine", "threads=1", "--machine", "device=cpu"]
RECIPE = """name: mine
base: {model}
target: {{path: {rows}, held_out: 8}}
probe: {{rows: 16, length: 16}}
generate: {{rows: 16, length: 16}}
mix: {{target_rows: 8, rehearsal_tokens: 64}}
train: {{learning_rate: 1.0e-3, epochs: 1}}
merge: {{alpha: 0.5}}
"""
Hook = Callable[[], None]


class Ended(NamedTuple):
    """How a run ended: its exit code, negative for the signal that ended it, and what it printed."""

    code: int
    out: str


class Run:
    """`python -m flows.mitigate WORDS` in a process group of its own; what it prints is in `log`."""

    def __init__(self, log: Path, words: list[str], environment: dict[str, str], before: Hook | None = None) -> None:
        """Start it; `before` is called in its process first, and may plant a fault there."""
        self.log = log
        log.touch()  # it is read before the process has got so far
        self.process = _fork.Process(target=_main, args=(log, words, environment, before))
        self.process.start()

    def wait(self, seconds: float = 240) -> Ended:
        """Return how it ended."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.kill()
            raise AssertionError(f"still ran after {seconds:.0f} s:\n{self.log.read_text()}")
        return Ended(self.process.exitcode, self.log.read_text())

    def kill(self) -> None:
        """End the whole group at once, as a machine that fails does."""
        assert self.process.pid
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()


def _main(log: Path, words: list[str], environment: dict[str, str], before: Hook | None) -> None:
    os.setsid()
    os.environ.update(environment)
    sys.argv = ["mitigate", *words]
    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    if before:
        before()
    start, command = (getattr(importlib.import_module(m), n) for m, n in (
        ("flows._cli", "start"), ("flows.mitigate", "mitigate_command")))  # fmt: skip
    start(command)


def pause(stage: str, sign: Path) -> None:
    """Make `stage` wait before its artifact is completed, while the file `sign` is there: it is made to say so."""
    from tasks import record

    step = record.step

    @contextmanager
    def paused(name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        with step(name, *args, **kwargs):
            yield
            if name == stage:
                sign.touch()
                while sign.exists():
                    time.sleep(0.02)

    record.step = paused


def fail(stage: str) -> None:
    """Make `stage` end with an error that nobody expected."""
    from tasks import record

    step = record.step

    @contextmanager
    def failing(name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        with step(name, *args, **kwargs):
            if name == stage:
                raise RuntimeError("planted failure")
            yield

    record.step = failing


def use_login(login: str) -> None:
    """Give Prefect's client a login, as the environment does that it is imported in."""
    from prefect.settings import PREFECT_API_AUTH_STRING, temporary_settings

    _settled.enter_context(temporary_settings({PREFECT_API_AUTH_STRING: login}))


def both(*hooks: Hook | None) -> None:
    """Call hooks in turn."""
    for hook in hooks:
        if hook:
            hook()


class Case:
    """A recipe and its data folder, in which everything is made already or, in a copy, all but some stages' results."""

    def __init__(self, folder: Path, recipe: Path, environment: dict[str, str]) -> None:
        """Use `folder`; its data folder is `data`."""
        self.folder, self.recipe, self.home, self.environment = folder, recipe, folder / "data", environment

    def copy(self, folder: Path, *without: str) -> "Case":
        """Return the case in `folder` without the artifacts of some stages."""
        shutil.copytree(self.home, folder / "data", symlinks=True)
        copied = Case(folder, self.recipe, self.environment)
        for stage in without:
            shutil.rmtree(self.place(stage, copied.home))
        return copied

    def place(self, stage: str, home: Path | None = None) -> Path:
        """Return the folder of the last artifact that a stage made."""
        (file,) = self.home.glob("reports/*/run_records.json")
        steps = json.loads(file.read_text())["run_records"][0]["steps"]
        made = [step["artifact"] for step in steps if step["stage"] == stage][-1]
        return (home or self.home) / "store" / str(made["kind"]) / str(made["key"])

    def start(self, *words: str, before: Hook | None = None, **environment: str) -> Run:
        """Start a run."""
        log = self.folder / f"log-{time.monotonic_ns()}.txt"
        own = os.environ | self.environment | {"CFSD_HOME": str(self.home)} | environment
        return Run(log, [str(self.recipe), "--home", str(self.home), *ON, *words], own, before)

    def run(self, *words: str, before: Hook | None = None, **environment: str) -> Ended:
        """Run to the end."""
        return self.start(*words, before=before, **environment).wait()

    @contextmanager
    def paused_in(self, stage: str, before: Hook | None = None) -> Iterator[Run]:
        """Start a run and hold it in `stage` for the block."""
        sign = self.folder / f"paused-{stage}"
        run = self.start(before=partial(both, before, partial(pause, stage, sign)))
        wait_for(lambda: sign.exists() or not run.process.is_alive())
        assert sign.exists(), run.wait().out
        yield run
        sign.unlink(missing_ok=True)

    def state(self) -> dict[str, tuple[int, str]]:
        """Return, for every complete artifact, when its manifest was written and the digest of its content."""
        found = {}
        for manifest in sorted(self.home.glob(f"store/*/*/{MANIFEST}")):
            if not manifest.parent.name.endswith(".draft"):
                content = json.loads(manifest.read_text())["content"]
                found[str(manifest.parent.relative_to(self.home))] = (manifest.stat().st_mtime_ns, content)
        return found


def case_in(folder: Path, environment: dict[str, str]) -> Case:
    """Write a model, rows and a recipe into `folder` and return the case, in which nothing was made yet."""
    from tests.conftest import save_model, write_rows  # late: it settles an environment of its own where it is imported

    rows, model = write_rows(folder / "rows.jsonl"), save_model(folder / "model")
    (folder / "recipe.yaml").write_text(RECIPE.format(model=model, rows=rows))
    return Case(folder, folder / "recipe.yaml", environment)


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Return when `condition` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
