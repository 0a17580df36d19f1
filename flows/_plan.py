"""`--plan`: the flow walked without Prefect and without doing anything; what would run, and what it costs."""

import shutil
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from cfsd.errors import BadInput
from cfsd.estimate import GIB, Estimate, disk_bytes, estimate, parameters_of
from cfsd.machine import Machine, home
from cfsd.recipe import Recipe
from cfsd.report.run_record import RunRecord
from cfsd.store.artifact import Artifact
from cfsd.train.spec import check_sharding
from tasks._cluster import check_cluster
from tasks._stage import Planned, planning

Story = Callable[[Recipe, Machine], RunRecord]


def print_plan(recipes: dict[str, Recipe], machine: Machine, pipeline: Story, console: Console) -> None:
    """Print one line per stage that the recipes need, shared stages once."""
    table = Table("stage", "key", "state", "tokens", "memory", "time", title="plan")
    seen: set[object] = set()
    total = 0.0
    for recipe in recipes.values():
        steps, artifacts = walk(recipe, machine, pipeline)
        for step in steps:
            mark = step.key or (step.stage, *map(repr, step.inputs))
            if mark in seen:
                continue
            seen.add(mark)
            cost = estimate(step.stage, recipe, *artifacts, machine)
            total += 0 if step.cached else cost.seconds or 0
            table.add_row(step.stage, step.key or "-", _state(step), *_in_words(cost, step.cached))
    console.print(table)
    console.print(f"about {total / 60:.0f} minutes of computing that is not cached, within a factor of two")


def _in_words(cost: Estimate, cached: bool) -> tuple[str, str, str]:
    tokens = f"{cost.tokens:,.0f}" if cost.tokens else ""
    memory = f"{cost.memory / GIB:.1f} GiB" if cost.memory else ""
    return tokens, memory, f"{cost.seconds:.0f} s" if cost.seconds and not cached else ""


def walk(recipe: Recipe, machine: Machine, pipeline: Story) -> tuple[list[Planned], tuple[Artifact, Artifact]]:
    """Return the steps of `recipe` in order, and its base and target as far as they are known."""
    steps: list[Planned] = []
    token = planning.set(steps)
    try:
        run_record = pipeline(recipe, machine)
    finally:
        planning.reset(token)
    return steps, (run_record.artifacts["base"], run_record.artifacts["target"])


def check(recipe: Recipe, machine: Machine, pipeline: Story) -> None:
    """Raise BadInput for whatever can be told to be wrong before anything runs, a disk too small included."""
    recipe.check()
    check_cluster(machine)
    check_sharding(recipe.train, machine)
    steps, (base, _) = walk(recipe, machine, pipeline)
    if all(step.cached for step in steps):
        return
    needed, free = disk_bytes(recipe, parameters_of(recipe, base)), shutil.disk_usage(home()).free
    if needed > free:
        raise BadInput(
            f"the recipe needs about {needed / GIB:.1f} GiB, but the disk of {home()} has {free / GIB:.1f} GiB free; "
            "free some, choose another data folder with --home, or lower generate.rows"
        )


def _state(step: Planned) -> str:
    if step.key is None:
        waits = sorted(
            {str(i.metadata.get("made_by")) for i in step.inputs if isinstance(i, Artifact) and not i.content}
        )
        return f"depends on {', '.join(waits)}"
    return "cached" if step.cached else "runs"
