"""One recipe, several ways of training: every variant is a `mitigate` run, then one table, one figure, one report.

python -m flows.compare deployments/recipes/demo.yaml --seeds 3
"""

from prefect import flow

from cfsd.comparison import Comparison
from cfsd.machine import Machine
from cfsd.report.run_record import RunRecord
from flows._conclude import conclude
from flows.mitigate import mitigate
from tasks import record


@flow(name="compare", flow_run_name="{comparison.recipe.name}")
def compare(comparison: Comparison, machine: Machine = Machine()) -> list[RunRecord]:  # noqa: B008
    """Run every variant of the recipe; what they share (base, probe, corpus, base scores) is made once."""
    recipes = comparison.recipes()
    with record.comparison(comparison.recipe.name) as run_id:
        run_records = [mitigate(recipe, machine).model_copy(update={"name": name}) for name, recipe in recipes.items()]
        conclude(comparison.recipe.name, run_records, [run_id], notes=comparison.notes())
    return run_records


if __name__ == "__main__":
    from flows._cli import compare_command, start

    start(compare_command)
