"""What the commands on recipes share: check them, then print the plan or run the flow on a Prefect server."""

from collections.abc import Callable, Iterable

from cfsd.machine import Machine
from cfsd.recipe import Recipe
from flows._cli import console
from flows._conclude import Result
from flows._plan import Pipeline, checked, print_plans
from flows._temporary_server import prefect_server


def plan_or_run(
    recipes: Iterable[Recipe], machine: Machine, pipeline: Pipeline, run: Callable[[], Result], *, plan: bool
) -> Result | None:
    """Return the result of `run`, whose recipes take `pipeline`; None where only the plan was asked for, and printed.

    Raises: what `checked` raises, before anything runs.
    """
    with checked(recipes, machine, pipeline, only_plan=plan) as plans:
        if plan:
            print_plans(plans, machine, console)
            return None
        with prefect_server():
            return run()
