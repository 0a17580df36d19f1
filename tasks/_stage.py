"""Stage: how every step of a run is executed. Its key, the store first, the record, the retries.

All caching is decided here.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Concatenate, Generic, ParamSpec

from prefect import Task, task
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext

from cfsd.errors import CfsdError, Crashed, OutOfMemory
from cfsd.machine import Machine, home
from cfsd.process.child import is_out_of_memory
from cfsd.store.artifact import Artifact, Draft, Store, key_of
from tasks import record
from tasks._gpu_slots import gpu_slot
from tasks._planned import UNKNOWN, artifacts_in, planned, planning

P = ParamSpec("P")


class Stage(Generic[P]):
    """A call that returns the artifact of `work`, executed as a Prefect task only if the artifact is absent."""

    def __init__(self, work: Callable[Concatenate[Draft, P], None], name: str, kind: str, *, gpu: bool) -> None:
        self.work, self.stage, self.kind, self.gpu = work, name, kind, gpu
        signature = inspect.signature(work)
        self.signature = signature.replace(parameters=list(signature.parameters.values())[1:])  # without the draft
        self.__name__, self.__qualname__, self.__doc__ = work.__name__, work.__qualname__, work.__doc__
        self.__module__ = work.__module__
        self.task = self._task()

    def __reduce__(self) -> str:
        """Pickle the name that it has in its module: flows are sent to the workers of a cluster."""
        return self.__qualname__

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Artifact:
        """Return the artifact: from the store, else made. In a plan, say what would be made."""
        inputs = self._inputs(*args, **kwargs)
        counted_inputs = counted(self.signature, inputs)
        if (plan := planning.get()) is not None:
            return planned(plan, record.StepRun(self.stage, UNKNOWN, named(inputs)), self.kind, counted_inputs)
        store, key = Store(home()), key_of(self.stage, *counted_inputs)
        known = store.find(self.kind, key)
        executed = self._run_task(record.StepRun(self.stage, key, named(inputs)), known, *args, **kwargs)
        made = store.find(self.kind, key)
        assert made, "a stage that ended without an error leaves its artifact"
        store.share(made, record.say)  # what was made while the shared store was away, or before there was one
        record.keep_step(self.stage, store, made, named(inputs), executed=executed, gpu=self.gpu)
        return made

    def _inputs(self, *args: P.args, **kwargs: P.kwargs) -> dict[str, Any]:
        return self.signature.bind(*args, **kwargs).arguments

    def _run_task(self, step_run: record.StepRun, known: Artifact | None, *args: P.args, **kwargs: P.kwargs) -> bool:
        """Run the Prefect task under the name of the step; say whether this call executed the work."""
        run_name = f"{step_run.name()} {step_run.key}".replace("{", "{{").replace("}", "}}")  # a template, to Prefect
        run = self.task.with_options(refresh_cache=known is None, task_run_name=run_name)
        return bool(run(*args, **kwargs)["executed"]) and known is None

    def _task(self) -> Task[P, dict[str, Any]]:
        def execute(*args: P.args, **kwargs: P.kwargs) -> dict[str, Any]:
            made, executed = self._make(*args, **kwargs)
            return {"artifact": made.model_dump(mode="json"), "executed": executed}

        def cache_key(_: TaskRunContext, inputs: dict[str, Any]) -> str:
            return key_of(self.stage, *counted(self.signature, inputs))

        execute.__name__, execute.__doc__ = self.__name__, self.__doc__
        execute.__signature__ = self.signature.replace(return_annotation=dict[str, Any])  # type: ignore[attr-defined]
        return task(
            name=self.stage,
            tags={"gpu"} if self.gpu else None,
            cache_key_fn=cache_key,
            persist_result=True,
            result_serializer="json",
            retries=1,
            retry_condition_fn=_worth_retrying,
        )(execute)

    def _make(self, *args: P.args, **kwargs: P.kwargs) -> tuple[Artifact, bool]:
        """Return the artifact, and whether this call made it rather than another process that was faster."""
        inputs = self._inputs(*args, **kwargs)
        machine = next((value for value in inputs.values() if isinstance(value, Machine)), Machine())
        key = key_of(self.stage, *counted(self.signature, inputs))

        def do(draft: Draft) -> None:
            with (
                record.step(self.stage, key, draft, named(inputs), gpu=self.gpu),
                gpu_slot(machine, needed=self.gpu),
                enough_memory(self.stage, machine),
            ):
                self.work(draft, *args, **kwargs)
            _say(self.stage, draft.metadata)

        return Store(home()).make(
            self.kind, key, do,
            environment=machine.environment(self.stage), inputs=artifacts_in(inputs.values()), say=record.say,
        )  # fmt: skip


def stage(name: str, kind: str, *, gpu: bool = False) -> Callable[[Callable[Concatenate[Draft, P], None]], Stage[P]]:
    """Turn `work(draft, *inputs, machine)` into a call that returns the artifact, executed only if it is absent.

    Inputs that are artifacts count by content, specs by digest, a Machine not at all. An optional input, one that
    `work` declares with the default None, is in no key while it is None: a stage that learns to take one more input
    keeps its artifacts. Without that default a None is part of the key.
    """
    return lambda work: Stage(work, name, kind, gpu=gpu)


def counted(signature: inspect.Signature, inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the inputs that belong to a key: all but the machine and the optional ones that are None."""
    absent = {name for name, p in signature.parameters.items() if p.default is None and inputs.get(name) is None}
    return tuple(v for name, v in inputs.items() if name not in absent and not isinstance(v, Machine))


def named(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs that a record names: all but the machine."""
    return {argument: value for argument, value in inputs.items() if not isinstance(value, Machine)}


@contextmanager
def enough_memory(stage: str, machine: Machine) -> Iterator[None]:
    """Turn an error of the device's allocator into one message, and let go of the models that stayed loaded."""
    try:
        yield
    except Exception as error:
        if isinstance(error, CfsdError) or not is_out_of_memory(error):
            raise
        from cfsd.model.loading import release_models

        release_models()
        said = str(error).partition("\n")[0]
        raise OutOfMemory(
            f"out of memory in {stage} ({said}); what helps: machine.micro_batch_tokens (now "
            f"{machine.micro_batch_tokens}): lower; machine.sampling_rows (now {machine.sampling_rows}): lower; other "
            "programs on this device: end them; --machine device=cpu"
        ) from error


def inherited(model: Artifact) -> dict[str, Any]:
    """Return what the metadata of `model` tells of a model that is made from it: all but what its own stage said."""
    return {name: value for name, value in model.metadata.items() if name != "said"}


def _say(name: str, metadata: Mapping[str, Any]) -> None:
    """Print what a stage has to say: what it read in one of several ways, does by a slower path, or leaves out."""
    for sentence in metadata.get("said", ()):
        record.say(f"{name}: {sentence}")


def _worth_retrying(_: Any, __: TaskRun, state: State[Any]) -> bool:
    """Say whether a second try could help: not after bad input, out of memory, NaN or a stop."""
    try:
        state.result()
    except (Crashed, ConnectionError):
        return True
    except BaseException:
        return False
    return False
