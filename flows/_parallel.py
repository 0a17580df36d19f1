"""Variants at once: each is a flow run of its own, in a process that sees one device.

The processes are `flows._variant_process`, one per device, and live as long as the comparison. What variants share is
made once: the store's lock on its key lets one of them make it, the others wait. An error lets the variants that run
finish, and no other one begins; what is finished is kept. A stop ends all of them, and they keep their drafts.
"""

import json
import os
import platform
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any, Self
from uuid import UUID

import httpx
from filelock import FileLock, Timeout
from prefect import Flow, Task, flow
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext, TagsContext
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import get_current_settings
from prefect.states import Crashed as CrashedState
from prefect.states import Pending

from cfsd.errors import CfsdError, Crashed
from cfsd.machine import CUDA, HOME_VARIABLE, Machine, home
from cfsd.process.child import PARENT, STOP_SECONDS
from cfsd.recipe import Recipe
from cfsd.report.run_record import RunRecord
from cfsd.store.locks import held
from flows._explained import CONTINUE
from flows._variant_process import MARK, READY, Answer, Request
from flows.mitigate import mitigate, pipeline
from tasks import record
from tasks._gpu_slots import gpu_slots

ROOT = Path(__file__).parent.parent
SECONDS_TO_END = STOP_SECONDS + 30  # a training that stops writes a checkpoint first
VariantResult = RunRecord | CfsdError
Tell = Callable[[str, str], None]  # a variant's name and a line that it wrote


def run_variants(recipes: Mapping[str, Recipe], machine: Machine, comparison: str | None) -> list[RunRecord]:
    """Run `mitigate` for every recipe, as many at once as there are devices; return the run records in this order.

    `comparison`: the MLflow run that they stand below. On one device they run in this process, one after the other.
    """
    count = min(machine.resolved_devices(), len(recipes))
    if count == 1:
        found: Mapping[str, VariantResult] = {
            name: mitigate(recipe, machine).only() for name, recipe in recipes.items()
        }
    else:
        with Slots(count, machine, mitigate, comparison) as slots:
            found = slots.run(recipes)
    return [made.model_copy(update={"name": name}) for name, made in found.items() if isinstance(made, RunRecord)]


@flow(name="pipeline", flow_run_name="{recipe.name}", validate_parameters=False)
def take(recipe: Recipe, machine: Machine) -> RunRecord:
    """Take the whole pipeline of a recipe, without a report: what a study is made of."""
    return pipeline(recipe, machine)


class Slots:
    """Processes that run variants, each on a device of its own, for the time of a block."""

    def __init__(self, count: int, machine: Machine, work: Flow[Any, Any], comparison: str | None = None) -> None:
        """Take up to `count` devices for `work`, which takes a recipe and a machine."""
        self.count, self.work, self.comparison = count, work, comparison
        self.machine, self.devices = machine.one_of(count), ExitStack()
        self.cuda, self.width = machine.resolved_device() == "cuda", 0
        self.processes: list[_Process] = []
        if self.cuda and (slots := gpu_slots(machine)) < count:
            record.say(
                f"Prefect's limit gpu has {slots} slot(s) for {count} devices, so stages on GPUs wait for each other; "
                f"raise it: prefect gcl update gpu --limit {machine.visible_devices()}"
            )

    def __enter__(self) -> Self:
        """Start the processes."""
        own: Sequence[str | None] = [None] * self.count
        if self.cuda:
            own = claimed(self.machine.visible_gpus(), self.count, self.devices)
        record.say(f"{len(own)} variants at once, each on one device and {self.machine.threads} CPU thread(s)")
        self.processes = [_Process(device) for device in own]
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the processes; those that still work are stopped as by Ctrl-C, and keep their drafts."""
        with self.devices:
            _end(self.processes, self._tell)
        if kind:  # a process that is stopped on a busy machine may not reach MLflow in time to end its runs
            record.tracked(record.end_dead_runs)

    def run(
        self, recipes: Mapping[str, Recipe], spared: tuple[type[CfsdError], ...] = (),
        told: Callable[[str, VariantResult], None] = lambda _, __: None,
    ) -> dict[str, VariantResult]:  # fmt: skip
        """Return what each recipe led to, in order; an error of a kind in `spared` takes the place of a run record.

        `told` gets each as it comes.

        Raises:
            CfsdError: The first other error, once the variants that were running have ended.
        """
        waiting, found, first = deque(recipes.items()), dict[str, VariantResult](), list[CfsdError]()
        self.width = max(map(len, recipes), default=0)
        while True:
            for process in self.processes if not first else ():
                if waiting and process.answers.open and not process.name:
                    process.begin(self._request(*waiting.popleft()))
            if not any(process.name for process in self.processes):
                break
            for process in _that_speak(self.processes):
                name, content = process.name, process.hear(self._tell)
                if content is None or not name:
                    continue
                found[name], process.name = content, ""
                told(name, content)
                if isinstance(content, CfsdError):
                    self._tell(name, f"error: {content}")
                    first += [] if isinstance(content, spared) else [type(content)(f"{name}: {content}")]
        if waiting and not first:
            first = [Crashed(f"the processes that run variants ended; {CONTINUE}")]
        if first:
            raise first[0]
        return {name: found[name] for name in recipes}

    def _request(self, name: str, recipe: Recipe) -> Request:
        flow_run = subflow_run(self.work, name, {"recipe": recipe, "machine": self.machine})
        function = f"{self.work.fn.__module__}:{self.work.fn.__name__}"
        return Request(
            name=name, flow=function, flow_run=flow_run, recipe=recipe, machine=self.machine, comparison=self.comparison
        )

    def _tell(self, name: str, line: str) -> None:
        record.console.print(f"{name:<{self.width}} | {line}", markup=False)


class _Process:
    """One `flows._variant_process`: the variant that it runs, and what it writes."""

    def __init__(self, device: str | None) -> None:
        """Start it; it sees the GPU `device` alone, if there is one."""
        answers, theirs = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flows._variant_process", str(theirs)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, pass_fds=(theirs,), start_new_session=True,
            env=_environment(device),
        )  # fmt: skip
        os.close(theirs)
        assert self.process.stdin and self.process.stdout
        self.requests: IO[bytes] = self.process.stdin
        self.output, self.answers = _Lines(self.process.stdout), _Lines(os.fdopen(answers, "rb"))
        self.name, self.said, self.flow_run = "", "", UUID(int=0)
        self.ready = False

    def begin(self, request: Request) -> None:
        """Let it run a variant."""
        self.name, self.flow_run = request.name, request.flow_run
        with suppress(BrokenPipeError):  # it is gone, which `hear` finds
            self.requests.write(request.model_dump_json().encode() + b"\n")
            self.requests.flush()

    def hear(self, tell: Tell) -> VariantResult | None:
        """Pass on the lines that it wrote; return what its variant led to, None if that is still open."""
        found = None
        for line in self.answers.read():
            if (content := json.loads(line)) == READY:
                self.ready = True
            else:
                found = Answer.model_validate(content).content()
        self.pass_on(tell)  # what it wrote before its answer is there by now
        return found if found or self.answers.open or not self.name else self._lost()

    def pass_on(self, tell: Tell) -> None:
        """Pass on the lines that it wrote, each with the name of its variant."""
        for line in self.output.read():
            if line.startswith(MARK):
                self.said = line.removeprefix(MARK)
            else:
                tell(self.said or self.name, line)

    def stop(self) -> None:
        """Ask it to end: at once where nothing is lost, else after it has put its draft in order."""
        with suppress(BrokenPipeError):
            self.requests.close()
        if self.name and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT if self.ready else signal.SIGKILL)

    def end(self) -> None:
        """Make it end, if it has not."""
        if self.process.poll() is None:
            self.process.kill()
        if self.process.wait() == -signal.SIGKILL and self.name:
            crash(self.flow_run, "its process was ended")
        for pipe in (self.output, self.answers):
            pipe.file.close()

    def _lost(self) -> Crashed:
        """Return the error of a process that ended without an answer; its flow run crashed with it."""
        code = self.process.wait()
        why = " (was the memory full, or did somebody kill it?)" if code == -signal.SIGKILL else ""
        error = f"its process ended with code {code}{why}; {CONTINUE}"
        crash(self.flow_run, error)
        return Crashed(error)


class _Lines:
    """Whole lines out of a pipe, as they come."""

    def __init__(self, file: IO[bytes]) -> None:
        """Read `file`. It alone closes its descriptor: closed by number, it would close another file's once more."""
        os.set_blocking(file.fileno(), False)
        self.file, self.rest, self.open = file, b"", True

    def fileno(self) -> int:
        """Return the number of the open file."""
        return self.file.fileno()

    def read(self) -> list[str]:
        """Return the lines that have come; `open` is False once there are no more."""
        with suppress(BlockingIOError):
            while self.open:
                part = os.read(self.fileno(), 1 << 16)
                self.rest, self.open = self.rest + part, bool(part)
        *lines, self.rest = self.rest.split(b"\n") if self.open else [*self.rest.splitlines(), b""]
        return [line.decode(errors="replace") for line in lines]


def _that_speak(processes: Iterable[_Process], seconds: float | None = None) -> list[_Process]:
    """Return the processes of which something can be read, or that ended, once there is one."""
    with selectors.DefaultSelector() as selector:
        for process in processes:
            for pipe in (process.output, process.answers):
                if pipe.open:
                    selector.register(pipe, selectors.EVENT_READ, process)
        ready = {id(key.data): key.data for key, _ in selector.select(seconds)}
    return list(ready.values())


def _end(processes: Sequence[_Process], tell: Tell) -> None:
    for process in processes:
        process.stop()
    end = time.monotonic() + SECONDS_TO_END
    try:
        while any(process.process.poll() is None for process in processes) and time.monotonic() < end:
            for process in _that_speak(processes, 0.2):
                with suppress(BrokenPipeError):  # nobody reads the output any more, and that is being said
                    process.pass_on(tell)
    finally:
        for process in processes:
            process.end()


def subflow_run(work: Flow[Any, Any], name: str, parameters: dict[str, Any]) -> UUID:
    """Return a new run of `work` below the flow run at hand, for another process to take."""
    above = FlowRunContext.get()
    assert above and above.flow_run, "variants stand below a comparison"
    with get_client(sync_client=True) as client:
        task: Task[Any, Any] = Task(fn=work.fn, name=work.name)
        task_run = client.create_task_run(task, above.flow_run.id, dynamic_key=name, name=name, state=Pending())
        tags = TagsContext.get().current_tags
        return client.create_flow_run(
            work,
            parameters=work.serialize_parameters(parameters),
            parent_task_run_id=task_run.id,
            state=Pending(),
            tags=tags,
        ).id


def crash(flow_run: UUID, why: str) -> None:
    """Tell Prefect, and MLflow, of a flow run whose process could not."""
    with suppress(httpx.HTTPError, PrefectHTTPStatusError), get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run, CrashedState(message=why), force=True)
    record.tracked(record.end_dead_runs)


def claimed(names: Sequence[str], count: int, stack: ExitStack) -> list[str]:
    """Return up to `count` of the devices, held until `stack` closes, without those that other comparisons hold."""
    locks = {name: home() / "store" / ".locks" / f"device-{platform.node()}-{name}.lock" for name in names}
    taken: list[str] = []
    for name, path in locks.items():
        with suppress(Timeout):
            path.parent.mkdir(parents=True, exist_ok=True)
            if len(taken) < count:
                stack.enter_context(FileLock(path).acquire(timeout=0))
                taken.append(name)
    if not taken:
        waiting = f"waiting for other comparisons over this data folder, which use all devices: {', '.join(names)}"
        stack.enter_context(held(locks[names[0]], waiting, record.say))
        return [names[0]]
    if len(taken) < count:
        record.say(f"{count - len(taken)} of {count} devices are used by other comparisons over this data folder")
    return taken


def _environment(device: str | None) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT__")}  # of this run alone
    path = os.pathsep.join(filter(None, [str(ROOT), own.get("PYTHONPATH")]))
    own |= get_current_settings().to_environment_variables(exclude_unset=True)
    own |= {HOME_VARIABLE: str(home()), PARENT: str(os.getpid()), "PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
    return own | ({CUDA: device} if device is not None else {})
