"""One recipe, several ways of training: every variant is a `mitigate` run, then one table, one figure, one report.

python -m flows.compare deployments/recipes/demo.yaml --seeds 3
python -m flows.compare deployments/recipes/demo.yaml --seeds 5 --seeds-vary train,mix,corpus,probe
"""

from pathlib import Path
from typing import Annotated

import typer
from prefect import flow

from cfsd.comparison import Comparison
from cfsd.machine import Machine
from flows._cli import Home, On, Plan, Set, machine_of, start
from flows._conclude import Result, conclude, show
from flows._named import name_flow_run
from flows._parallel import run_variants
from flows._plan import checked
from flows._plan_or_run import plan_or_run
from flows.mitigate import pipeline
from tasks import record


@flow(name="compare")
def compare(comparison: Comparison, machine: Machine = Machine()) -> Result:  # noqa: B008
    """Run every variant of the recipe; what they share (base, probe, corpus, base scores) is made once."""
    title, recipes = comparison.recipe.name, comparison.recipes()
    name_flow_run(comparison.recipe, f"{len(recipes)} trainings")
    with checked(recipes.values(), machine, pipeline), record.comparison(title) as run_id:
        run_records = run_variants(recipes, machine, run_id)
        return conclude(title, run_records, [run_id], notes=comparison.notes())


def compare_command(
    comparison: Annotated[Path, typer.Argument(help="A recipe and its variants in YAML")],
    set_: Set = [],  # noqa: B006
    machine: On = [],  # noqa: B006
    seeds: Annotated[int | None, typer.Option(min=1, help="Repeats per variant; see --seeds-vary")] = None,
    seeds_vary: Annotated[
        str | None,
        typer.Option(
            metavar="PARTS", help="What differs between repeats, such as train,mix,corpus,probe; default: train,mix"
        ),
    ] = None,
    home: Home = None,
    plan: Plan = False,
) -> None:
    """Run every variant of a recipe and put them into one table, one figure and one report."""
    parts = [part.strip() for part in seeds_vary.split(",")] if seeds_vary else None
    loaded, on = Comparison.load(comparison, set_, seeds, parts), machine_of(machine)
    if result := plan_or_run(loaded.recipes().values(), on, pipeline, lambda: compare(loaded, on), plan=plan):
        show(result)


if __name__ == "__main__":
    start(compare_command)
