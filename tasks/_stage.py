"""One decorator for every stage: its key, the store first, the record, the retries. All caching is decided here."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from typing import Any, Concatenate, NamedTuple, ParamSpec

from prefect import Task, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.client.schemas.objects import State, TaskRun
from prefect.concurrency.asyncio import AcquireConcurrencySlotTimeoutError
from prefect.concurrency.sync import concurrency
from prefect.context import TaskRunContext
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from cfsd.errors import Crashed
from cfsd.machine import Machine, home
from cfsd.spec import digest_of
from cfsd.store.artifact import Artifact, Draft, Store, key_of
from tasks import record

P = ParamSpec("P")
UNKNOWN = ""  # the content of an artifact that a plan has not made yet
GPU_SLOT = "gpu"
SOON = 5  # seconds after which a run says that it waits


class Planned(NamedTuple):
    """What a stage would do."""

    stage: str
    key: str | None  # None: depends on a stage that has not run
    cached: bool
    inputs: tuple[Any, ...]
    name: str  # for people, as `evaluate facts · tuned`


planning: ContextVar[list[Planned] | None] = ContextVar("planning", default=None)


def stage(
    name: str, kind: str, *, gpu: bool = False
) -> Callable[[Callable[Concatenate[Draft, P], None]], Callable[P, Artifact]]:
    """Turn `work(draft, *inputs, machine)` into a call that returns the artifact, executed only if it is absent.

    Inputs that are artifacts count by content, specs by digest, a Machine not at all. An optional input, one that
    `work` declares with the default None, is in no key while it is None: a stage that learns to take one more input
    keeps its artifacts. Without that default a None is part of the key.
    """

    def decorate(work: Callable[Concatenate[Draft, P], None]) -> Callable[P, Artifact]:
        signature = inspect.signature(work)
        open_signature = signature.replace(parameters=list(signature.parameters.values())[1:])

        def inputs_of(args: Any, kwargs: Any) -> tuple[Any, ...]:
            return counted(open_signature, open_signature.bind(*args, **kwargs).arguments)

        def named(*args: P.args, **kwargs: P.kwargs) -> dict[str, Any]:
            inputs = open_signature.bind(*args, **kwargs).arguments.items()
            return {argument: value for argument, value in inputs if not isinstance(value, Machine)}

        def execute(*args: P.args, **kwargs: P.kwargs) -> dict[str, Any]:
            values = (*args, *kwargs.values())
            machine = next((value for value in values if isinstance(value, Machine)), Machine())
            key = key_of(name, *inputs_of(args, kwargs))

            def do(draft: Draft) -> None:
                with record.step(name, key, draft, named(*args, **kwargs), gpu=gpu), gpu_slot(machine, needed=gpu):
                    work(draft, *args, **kwargs)
                _say(name, draft.metadata)

            made = Store(home()).make(
                kind, key, do, environment=machine.environment(name), inputs=artifacts_in(values), say=record.say
            )
            return {"artifact": made[0].model_dump(mode="json"), "executed": made[1]}

        def cache_key(_: TaskRunContext, bound: dict[str, Any]) -> str:
            return key_of(name, *counted(open_signature, bound))

        execute.__name__, execute.__doc__ = work.__name__, work.__doc__
        execute.__signature__ = open_signature.replace(return_annotation=dict[str, Any])  # type: ignore[attr-defined]
        prefect_task: Task[P, dict[str, Any]] = task(
            name=name,
            tags={"gpu"} if gpu else None,
            cache_key_fn=cache_key,
            persist_result=True,
            result_serializer="json",
            retries=1,
            retry_condition_fn=_worth_retrying,
        )(execute)

        def call(*args: P.args, **kwargs: P.kwargs) -> Artifact:
            if (plan := planning.get()) is not None:
                step_run = record.StepRun(name, UNKNOWN, named(*args, **kwargs))
                return _planned(plan, step_run, kind, inputs_of(args, kwargs))
            store, key = Store(home()), key_of(name, *inputs_of(args, kwargs))
            known, called = store.find(kind, key), record.StepRun(name, key, named(*args, **kwargs)).name()
            run_name = f"{called} {key}".replace("{", "{{").replace("}", "}}")  # Prefect reads it as a template
            result = prefect_task.with_options(refresh_cache=known is None, task_run_name=run_name)(*args, **kwargs)
            made = store.find(kind, key)
            assert made, "a stage that ended without an error leaves its artifact"
            executed = known is None and bool(result["executed"])
            store.share(made, record.say)  # what was made while the shared store was away, or before there was one
            record.keep_step(name, store, made, named(*args, **kwargs), executed=executed, gpu=gpu)
            return made

        call.__doc__ = work.__doc__
        # named as in its module, by which pickle finds it: flows are sent to the workers of a cluster
        call.__module__, call.__name__, call.__qualname__ = work.__module__, work.__name__, work.__qualname__
        return call

    return decorate


def counted(signature: inspect.Signature, inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the inputs that belong to a key: all but the machine and the optional ones that are None."""
    absent = {name for name, p in signature.parameters.items() if p.default is None and inputs.get(name) is None}
    return tuple(v for name, v in inputs.items() if name not in absent and not isinstance(v, Machine))


def artifacts_in(inputs: Iterable[Any]) -> Iterator[Artifact]:
    """Yield the artifacts among the inputs of a stage, those of a tuple one by one."""
    for value in inputs:
        yield from (part for part in (value if isinstance(value, tuple) else (value,)) if isinstance(part, Artifact))


def _planned(plan: list[Planned], step_run: record.StepRun, kind: str, inputs: tuple[Any, ...]) -> Artifact:
    name = step_run.stage
    known = all(value.content != UNKNOWN for value in artifacts_in(inputs))
    key = key_of(name, *inputs) if known else None
    cached = Store(home()).find(kind, key) if key else None
    plan.append(Planned(name, key, cached is not None, inputs, step_run.name()))
    if cached:
        return cached
    how = digest_of([name, *map(repr, inputs)])  # tells what two variants will make apart before it has a key
    return Artifact(kind=kind, key=key or UNKNOWN, content=UNKNOWN, metadata={"made_by": name, "how": how})


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


@contextmanager
def gpu_slot(machine: Machine, *, needed: bool) -> Iterator[None]:
    """Hold as many of the server's `gpu` slots as this process sees GPUs, while a stage computes on them."""
    if not needed or machine.resolved_device() != "cuda":
        yield
        return
    slots = min(machine.visible_devices(), gpu_slots(machine))
    held = partial(concurrency, GPU_SLOT, occupy=slots, strict=True, raise_on_lease_renewal_failure=False)
    with ExitStack() as stack:
        try:
            stack.enter_context(held(timeout_seconds=SOON))
        except AcquireConcurrencySlotTimeoutError:
            record.say(f"waiting for other runs to free {slots} of the `{GPU_SLOT}` slots; those of a killed run are "
                       f"free after five minutes (prefect gcl inspect {GPU_SLOT})")  # fmt: skip
            stack.enter_context(held())
        yield


def gpu_slots(machine: Machine) -> int:
    """Return how many `gpu` slots the server has: as many as the machine that made the limit, the first to ask, sees.

    Raise it where more machines come: `prefect gcl update gpu --limit 8`.
    """
    with get_client(sync_client=True) as client:
        try:
            return client.read_global_concurrency_limit_by_name(GPU_SLOT).limit
        except ObjectNotFound:
            with suppress(ObjectAlreadyExists):  # another process made it just now
                wanted = GlobalConcurrencyLimitCreate(name=GPU_SLOT, limit=machine.visible_devices())
                client.create_global_concurrency_limit(wanted)
            return client.read_global_concurrency_limit_by_name(GPU_SLOT).limit
