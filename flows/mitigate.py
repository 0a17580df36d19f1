"""The main job: fine-tune on the target while rehearsing text that the base model wrote, and say what it cost.

python -m flows.mitigate deployments/recipes/tiny.yaml --set train.learning_rate=1e-4
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from prefect import flow

from cfsd.filter.spec import check_kept
from cfsd.generate.spec import UNPROMPTED
from cfsd.machine import Machine
from cfsd.recipe import Recipe
from cfsd.report.run_record import RunRecord, controls_of, roles_of
from cfsd.stages import FILTER
from flows._cli import Home, On, Plan, Set, machine_of, start
from flows._conclude import Result, conclude, show
from flows._named import name_flow_run
from flows._plan import checked
from flows._plan_or_run import plan_or_run
from flows.corpus import corpus_pipeline, make_corpus
from tasks import record
from tasks.check import check_corpus
from tasks.evaluate import evaluate_base, evaluate_tuned
from tasks.fisher import estimate_fisher
from tasks.generate import corpus_settings, sample_along, sample_control, sample_watched
from tasks.merge import fit_alpha, merge_model
from tasks.mix import mix_rows
from tasks.train import OfBase, train_model
from tasks.weigh import store_target, weigh_target


def pipeline(recipe: Recipe, machine: Machine) -> RunRecord:
    """Take every step of the recipe.

    Each is cached on its own settings and the content of its inputs: a new learning rate trains and evaluates again,
    and never samples again.
    """
    run_record = corpus_pipeline(recipe, machine)
    base, target, selected_target, rehearsed = (
        run_record.artifacts[role] for role in ("base", "target", "selected_target", "selected_corpus")
    )
    check_kept(run_record.artifacts["corpus"], run_record.artifacts["filtered"])
    sampled = sample_along(base, recipe.probe, machine)
    probe = sampled[UNPROMPTED]
    losses = weigh_target(base, selected_target, recipe.mix, recipe.train.methods, machine)
    along = store_target(base, selected_target, recipe.train.methods, machine)
    mixture = mix_rows(selected_target, rehearsed, losses, recipe.mix, machine)
    settings, sampled_corpus = corpus_settings(base, recipe), run_record.artifacts["corpus"]
    corpus_check = check_corpus(base, probe, sampled_corpus, mixture, settings, machine)
    fisher = estimate_fisher(base, sampled_corpus, recipe.train.methods, machine)
    watched = sample_watched(base, target, recipe.probe, recipe.train.watch, recipe.evaluate, machine)
    budgets = recipe.budgets(sampled)
    merging = recipe.merge.keeping(budgets)
    controls = sample_control(base, recipe.probe, budgets, machine)
    before = evaluate_base(base, target, recipe.evaluate, machine)  # a benchmark that cannot be had ends it here
    of_base = OfBase(fisher, losses, along)
    tuned = train_model(base, mixture, rehearsed, of_base, watched, recipe.train, machine)
    fitted = fit_alpha(base, tuned, controls, merging, machine)
    final = merge_model(base, tuned, fitted or merging, machine)
    after = evaluate_tuned(base, final, target, sampled, recipe.evaluate, machine)
    made = {**roles_of(sampled), **controls_of(controls), "mixture": mixture, "tuned": tuned, "final": final}
    optional = {"checked": corpus_check, "fitted": fitted}
    made |= {role: artifact for role, artifact in optional.items() if artifact}
    return run_record.model_copy(update={"artifacts": run_record.artifacts | made, "before": before, "after": after})


@flow(name="mitigate")
def mitigate(recipe: Recipe, machine: Machine = Machine()) -> Result:  # noqa: B008
    """Fine-tune on the target, rehearsing the base model's own text, and measure what was learned and forgotten."""
    name_flow_run(recipe)
    with checked([recipe], machine, pipeline), record.variant(recipe.name, recipe) as variant:
        run_record = pipeline(recipe, machine).model_copy(update={"steps": tuple(variant.steps)})
        return conclude(recipe.name, [run_record], [variant.run_id])


class Until(StrEnum):
    """Where to stop."""

    filter = FILTER


def mitigate_command(
    recipe: Annotated[Path, typer.Argument(help="A recipe in YAML")],
    set_: Set = [],  # noqa: B006
    machine: On = [],  # noqa: B006
    home: Home = None,
    plan: Plan = False,
    until: Annotated[
        Until | None, typer.Option(help="filter: make the corpus, write a page that shows it, and stop")
    ] = None,
) -> None:
    """Fine-tune on the target, rehearsing the base model's own text, and report what was learned and forgotten."""
    loaded, on = Recipe.load(recipe, set_), machine_of(machine)
    if until:
        make_corpus(loaded, on, plan=plan)
        return
    if result := plan_or_run([loaded], on, pipeline, lambda: mitigate(loaded, on), plan=plan):
        show(result)


if __name__ == "__main__":
    start(mitigate_command)
