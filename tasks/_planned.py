"""What a plan says of a stage in place of executing it: its key, and whether its artifact is there."""

from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

from cfsd.machine import home
from cfsd.spec import digest_of
from cfsd.store.artifact import Artifact, Store, key_of
from tasks import record

UNKNOWN = ""  # the content of an artifact that a plan has not made yet


class Planned(NamedTuple):
    """What a stage would do."""

    stage: str
    key: str | None  # None: depends on a stage that has not run
    cached: bool
    inputs: tuple[Any, ...]
    name: str  # for people, as `evaluate facts · tuned`


planning: ContextVar[list[Planned] | None] = ContextVar("planning", default=None)


def artifacts_in(inputs: Iterable[Any]) -> Iterator[Artifact]:
    """Yield the artifacts among the inputs of a stage, those of a tuple one by one."""
    for value in inputs:
        yield from (part for part in (value if isinstance(value, tuple) else (value,)) if isinstance(part, Artifact))


def planned(plan: list[Planned], step_run: record.StepRun, kind: str, inputs: tuple[Any, ...]) -> Artifact:
    """Add what a stage would do to `plan`, and return its artifact: the one of the store, else a stand-in for it."""
    name = step_run.stage
    known = all(value.content != UNKNOWN for value in artifacts_in(inputs))
    key = key_of(name, *inputs) if known else None
    cached = Store(home()).find(kind, key) if key else None
    plan.append(Planned(name, key, cached is not None, inputs, step_run.name()))
    if cached:
        return cached
    how = digest_of([name, *map(repr, inputs)])  # tells what two variants will make apart before it has a key
    return Artifact(kind=kind, key=key or UNKNOWN, content=UNKNOWN, metadata={"made_by": name, "how": how})
