"""The corpus alone: sampled, filtered, selected, and a page to look at it before anything is trained.

python -m flows.mitigate recipe.yaml --until filter
"""

from prefect import flow

from cfsd.machine import Machine
from cfsd.recipe import Recipe
from cfsd.report.run_record import RunRecord
from flows._conclude import conclude_corpus
from flows._plan import check
from tasks import record
from tasks.fetch import fetch_model
from tasks.filter import filter_corpus
from tasks.generate import generate_corpus
from tasks.select import select_corpus, select_target
from tasks.target import prepare_target


def corpus_pipeline(recipe: Recipe, machine: Machine) -> RunRecord:
    """Take the steps up to the rows that will be rehearsed."""
    base = fetch_model(recipe.base, machine)
    recipe.check_base(base)
    target = prepare_target(base, recipe.target, machine)
    chosen = select_target(base, target, recipe.select, machine)
    recipe.check_target(chosen)
    corpus = generate_corpus(base, target, recipe.generate, machine)
    kept = filter_corpus(corpus, target, recipe.evaluate, recipe.filter, machine)
    selected = select_corpus(base, kept, recipe.select, machine)
    return RunRecord(
        name=recipe.name,
        recipe=recipe,
        digest=recipe.digest(),
        artifacts={"base": base, "target": target, "selected_target": chosen, "corpus": corpus, "filtered": kept,
                   "selected_corpus": selected},
    )  # fmt: skip


@flow(name="corpus", flow_run_name="{recipe.name}", validate_parameters=True)
def corpus(recipe: Recipe, machine: Machine = Machine()) -> RunRecord:  # noqa: B008
    """Make the rehearsal corpus of a recipe and a page that shows it; train nothing."""
    check(recipe, machine, corpus_pipeline)
    name = f"{recipe.name}: corpus"
    with record.variant(name, recipe) as variant:
        run_record = corpus_pipeline(recipe, machine).model_copy(update={"name": name, "steps": tuple(variant.steps)})
        conclude_corpus(name, [run_record], variant.run_id)
    return run_record
