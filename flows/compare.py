"""One recipe, several ways of training: every variant is a `mitigate` run, then one table, one figure, one report.

python -m flows.compare deployments/recipes/demo.yaml --seeds 3
"""

from prefect import flow

from cfsd.machine import Machine
from cfsd.recipe import Comparison
from cfsd.summary import Trail
from flows._conclude import conclude
from flows.mitigate import mitigate
from tasks import record


@flow(name="compare", flow_run_name="{comparison.recipe.name}")
def compare(comparison: Comparison, machine: Machine = Machine()) -> list[Trail]:  # noqa: B008
    """Run every variant of the recipe; what they share (base, probe, corpus, base scores) is made once."""
    recipes = comparison.recipes()
    with record.comparison(comparison.recipe.name) as run_id:
        trails = [mitigate(recipe, machine).model_copy(update={"name": name}) for name, recipe in recipes.items()]
        conclude(comparison.recipe.name, trails, [run_id], notes=comparison.notes())
    return trails


if __name__ == "__main__":
    from flows._cli import compare_command, start

    start(compare_command)
