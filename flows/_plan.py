"""What a flow would do: its pipeline, walked without executing a stage, checked, and printed by `--plan`."""

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from cfsd.errors import NotHere
from cfsd.estimate import (
    CHECKED,
    COMMAND_SECONDS,
    GIB,
    KEPT_BYTES,
    STAGE_SECONDS,
    Estimate,
    disk_bytes,
    estimate,
    job_of,
    parameters_of,
    rate_of,
)
from cfsd.generate.spec import AUTO
from cfsd.machine import Machine, home, lacking, lacks
from cfsd.model.checkpoint import lacks_chat_template
from cfsd.recipe import Recipe
from cfsd.report.run_record import RunRecord
from cfsd.stages import MERGE, TRAIN
from cfsd.store.artifact import Artifact, Store
from cfsd.store.sharing import check_shared_store
from cfsd.train.spec import check_sharding
from tasks._cluster import check_cluster
from tasks._planned import Planned, artifacts_in, planning
from tasks.fetch import check_model

Pipeline = Callable[[Recipe, Machine], RunRecord]
_checked: ContextVar[bool] = ContextVar("checked", default=False)


class Plan(NamedTuple):
    """The steps that a recipe takes, in order, and its base and target as far as they are known.

    `lacking`: what keeps the command from running on this machine, though another may have it.
    """

    recipe: Recipe
    steps: list[Planned]
    base: Artifact
    target: Artifact
    lacking: tuple[str, ...] = ()


@contextmanager
def checked(
    recipes: Iterable[Recipe], machine: Machine, pipeline: Pipeline, *, only_plan: bool = False
) -> Iterator[list[Plan]]:
    """Check recipes before anything runs and give their plans; within the block nothing is checked again.

    A command checks before it starts a server; a flow checks where no command did. `only_plan`: nothing is going to
    run, so that what this machine lacks is said in the plans.

    Raises:
        BadInput: An error that is detectable before running; what this machine lacks, as `NotHere`.
    """
    if _checked.get():
        yield []
        return
    with _lacking_noted(only_plan), usable(machine):
        plans = [_check(recipe, machine, pipeline) for recipe in recipes]
        _check_disk(plans)
        yield [plan._replace(lacking=tuple(dict.fromkeys(lacking.get() or ()))) for plan in plans]


@contextmanager
def usable(machine: Machine) -> Iterator[None]:
    """Keep `cfsd store gc` away for the block, after a look at the devices, the cluster and the shared store.

    Raises:
        BadInput: One of them cannot be used.
    """
    if _checked.get():
        yield
        return
    with Store(home()).in_use(), once_checked():
        _check_devices(machine)
        check_cluster(machine)
        check_shared_store()
        yield


def _check_devices(machine: Machine) -> None:
    if machine.device == "cuda":  # else it fits, and torch, which takes a second to import, need not say it
        machine.resolved_device()
    if machine.devices:
        machine.resolved_devices()


@contextmanager
def _lacking_noted(only_plan: bool) -> Iterator[None]:
    token = lacking.set([] if only_plan else None)
    try:
        yield
    finally:
        lacking.reset(token)


@contextmanager
def once_checked() -> Iterator[None]:
    """Check nothing within the block, because that was done before it."""
    token = _checked.set(True)
    try:
        yield
    finally:
        _checked.reset(token)


@contextmanager
def planned() -> Iterator[list[Planned]]:
    """Yield the steps that are taken within the block, none of which is executed."""
    steps: list[Planned] = []
    token = planning.set(steps)
    try:
        yield steps
    finally:
        planning.reset(token)


def walk(recipe: Recipe, machine: Machine, pipeline: Pipeline) -> Plan:
    """Return what `pipeline` would do."""
    with planned() as steps:
        run_record = pipeline(recipe, machine)
    return Plan(recipe, steps, run_record.artifacts["base"], run_record.artifacts["target"])


def _check(recipe: Recipe, machine: Machine, pipeline: Pipeline) -> Plan:
    """Return the plan of a recipe after all checks."""
    of_base, *others = recipe.checks()

    def base() -> None:
        of_base()
        check_model(recipe.base)

    checks: list[Callable[[], object]] = [base, *others, partial(check_sharding, recipe.train, machine)]
    for check in checks:
        _checked_here(check)
    return walk(recipe, machine, pipeline)


def _checked_here(check: Callable[[], object]) -> None:
    try:
        check()
    except NotHere as error:
        if lacking.get() is None:
            raise
        lacks(str(error))


def _check_disk(plans: list[Plan]) -> None:
    store = home() / "store"  # may be a link to another disk
    place = store if store.exists() else home()
    needed, free = _disk_bytes(plans), shutil.disk_usage(place).free
    if needed > free:
        lacks(
            f"what is left to do needs about {_size(needed)}, but the disk of {place} has {_size(free)} "
            "free; free some, choose another data folder with --home, lower generate.rows, or train fewer variants"
        )


def _size(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count * 1024 / GIB:.1f} MiB"


def _disk_bytes(plans: list[Plan]) -> float:
    """Return about how many bytes the rest of the plans takes: the largest one, and every further model."""
    left = [plan for plan in plans if not all(step.cached for step in plan.steps)]
    weights = {id(plan): parameters_of(plan.recipe, plan.base) or 0 for plan in left}
    models = {_mark(step): weights[id(plan)] for plan in left for step in plan.steps if _leaves_a_model(step)}
    largest = max((disk_bytes(plan.recipe, weights[id(plan)], _open(plan)) for plan in left), default=0.0)
    return largest + KEPT_BYTES * (sum(models.values()) - max(models.values(), default=0.0))


def _open(plan: Plan) -> set[str]:
    return {step.stage for step in plan.steps if not step.cached}


def _leaves_a_model(step: Planned) -> bool:
    return step.stage in (TRAIN, MERGE) and not step.cached


def _mark(step: Planned) -> object:
    """Return what is the same for equal steps of several plans."""
    return step.key or (step.stage, *map(repr, step.inputs))


def print_plans(plans: list[Plan], machine: Machine, console: Console) -> None:
    """Print one line per stage that the recipes need, shared stages once."""
    first = Column("stage", overflow="fold", min_width=24), Column("key", no_wrap=True)
    table = Table(*first, "state", "tokens", "memory", "time", title="plan", box=SIMPLE_HEAD)
    devices = min(machine.resolved_devices(), len(plans))
    own = machine.one_of(devices) if devices > 1 else machine
    rate = rate_of(own)
    found = list(costs(plans, own, rate))
    for step, cost in found:
        table.add_row(Text(step.name), step.key or "-", _state(step), *_in_words(cost, step.cached))
    console.print(table)
    total, unknown = seconds_of(found), [step.stage for step, cost in found if not step.cached and cost.seconds is None]
    console.print(_total(total, unknown, rate, own))
    console.print(f"disk: about {_disk_bytes(plans) / GIB:.1f} GiB for what is left to do")
    for line in dict.fromkeys(line for plan in plans for line in _assumed(plan)):
        console.print(line, markup=False)
    print_lacking(plans, console)
    if devices > 1:
        longest = max(seconds_of(costs([plan], own, rate)) for plan in plans)
        console.print(at_once(total, longest, devices))


def _assumed(plan: Plan) -> Iterator[str]:
    """Yield what `auto` stands for, and what is taken for granted of a base and a target that are not there yet."""
    recipe, base = plan.recipe, plan.base
    chooses = recipe.generate.rows and recipe.generate.source == AUTO and not lacks_chat_template(base)
    if chooses and (why := recipe.why_no_chats()):
        yield f"generate.source is auto: text without a prompt is rehearsed and no chats, as {why}"
    if base.content:
        return
    if AUTO in [mode.name for mode in recipe.probe.modes] and base.metadata.get("chat_template") is None:
        yield "probe.modes is auto: chats are planned, and left out if the base turns out to have no chat template"
    if recipe.target.kind == "hub":
        size = f"{recipe.target.rows:,} rows" if recipe.target.rows else "an unknown number of rows"
        yield (
            f"target {recipe.target.name} is not here: planned as {size} (target.rows) of {recipe.target.max_length:,} "
            "tokens (target.max_length), the most that it can be"
        )


def print_lacking(plans: list[Plan], console: Console) -> None:
    """Print what keeps the plans from running on this machine."""
    for reason in dict.fromkeys(reason for plan in plans for reason in plan.lacking):
        console.print(f"not on this machine as it is: {reason}", markup=False)


def seconds_of(found: Iterable[tuple[Planned, Estimate]]) -> float:
    """Return what steps take one after the other, with the start of the command; of unknown ones only their start."""
    return COMMAND_SECONDS + sum(STAGE_SECONDS + (cost.seconds or 0) for step, cost in found if not step.cached)


def at_once(total: float, longest: float, devices: int) -> str:
    """Return the bounds of what variants take on several devices; `longest`: the one that takes most, alone."""
    least, most = (max(1, seconds / 60) for seconds in (max(total / devices, longest), total))
    return (
        f"that is one after the other on one device; on {devices} at once between {least:.0f} minutes, if the work "
        f"divides evenly, and {most:.0f}, if every variant waits for what another one makes"
    )


def costs(plans: list[Plan], machine: Machine, rate: float) -> Iterator[tuple[Planned, Estimate]]:
    """Yield every step once, in order, with its cost on a machine of `rate` FLOPs a second."""
    seen: set[object] = set()
    for plan in plans:
        job = job_of(plan.recipe, plan.base, plan.target, machine)
        for step in plan.steps:
            if (mark := _mark(step)) not in seen:
                seen.add(mark)
                yield step, estimate(step.stage, step.inputs, job, rate)


def _total(seconds: float, unknown: list[str], rate: float, machine: Machine) -> str:
    """Return the sum, where its error is known, and which stages are not in it."""
    cuda = machine.resolved_device() == "cuda"
    measured = f"{rate / 1e9:.0f} GFLOP/s, {'a guess' if cuda else 'measured now'}"
    words = f"about {_span(seconds)}, at {measured}"
    words += f"; not counted: {', '.join(dict.fromkeys(unknown))}" if unknown else ""
    known = f"On two CPU cores each of the demo's stages took {1 / CHECKED:.2g} to {CHECKED} times what its plan says"
    return f"{words}. {known}; other machines were not compared"


def _span(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    return f"{minutes} minute{'s' * (minutes > 1)}" if seconds < 3 * 3600 else f"{seconds / 3600:.0f} hours"


def _in_words(cost: Estimate, cached: bool) -> tuple[str, str, str]:
    tokens = f"{cost.tokens:,.0f}" if cost.tokens else ""
    memory = f"{cost.memory / GIB:.1f} GiB" if cost.memory else ""
    seconds = "?" if cost.seconds is None else f"{cost.seconds:.0f} s"
    return tokens, memory, "" if cached else seconds


def _state(step: Planned) -> str:
    if step.key is None:
        waits = sorted({str(i.metadata.get("made_by")) for i in artifacts_in(step.inputs) if not i.content})
        return f"after {', '.join(waits)}"
    return "cached" if step.cached else "runs"
