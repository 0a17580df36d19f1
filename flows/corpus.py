"""The corpus alone: sampled, filtered and selected, with a page to look at before anything is trained.

python -m flows.corpus recipe.yaml       the same as python -m flows.mitigate recipe.yaml --until filter
"""

from pathlib import Path
from typing import Annotated

import typer
from prefect import flow

from cfsd.machine import Machine, home
from cfsd.recipe import Recipe
from cfsd.report.place import report_folder
from cfsd.report.run_record import RunRecord
from cfsd.store.artifact import Store
from flows._cli import Home, On, Plan, Set, console, machine_of, start
from flows._conclude import Result, link
from flows._named import name_flow_run
from flows._plan import checked
from flows._plan_or_run import plan_or_run
from tasks import record
from tasks.evaluate import check_benchmarks
from tasks.fetch import fetch_model
from tasks.filter import filter_corpus
from tasks.generate import check_modes, check_source, generate_corpus
from tasks.report import write_corpus_page
from tasks.select import select_corpus, select_target
from tasks.target import prepare_target, rewrite_target
from tasks.train import check_training


def corpus_pipeline(recipe: Recipe, machine: Machine) -> RunRecord:
    """Take the steps up to the rows that will be rehearsed."""
    base = fetch_model(recipe.base, machine)
    recipe.check_base(base)
    modes, generate = check_modes(base, recipe.probe), check_source(base, recipe)
    if base.content:
        recipe.check_modes(modes)
    check_benchmarks(base, recipe.evaluate, machine)
    check_training(base, recipe.train, machine)
    target = prepare_target(base, recipe.target.as_given(), machine)
    selected_target = select_target(base, target, recipe.select, machine)
    recipe.check_target(selected_target)
    selected_target = rewrite_target(base, selected_target, recipe.target.rewriting(), machine)
    earlier = tuple(prepare_target(base, known.as_given(), machine) for known in recipe.earlier)
    corpus = generate_corpus(base, target, generate, machine, earlier)
    filtered = filter_corpus(corpus, target, recipe.evaluate, recipe.filter, machine)
    selected_corpus = select_corpus(base, filtered, recipe.select, machine)
    return RunRecord(
        name=recipe.name,
        recipe=recipe,
        digest=recipe.digest(),
        artifacts={"base": base, "target": target, "selected_target": selected_target, "corpus": corpus,
                   "filtered": filtered, "selected_corpus": selected_corpus},
    )  # fmt: skip


@flow(name="corpus")
def corpus(recipe: Recipe, machine: Machine = Machine()) -> Result:  # noqa: B008
    """Make the rehearsal corpus of a recipe and a page that shows it; train nothing."""
    name = f"{recipe.name}: corpus"
    name_flow_run(recipe, "corpus")
    with checked([recipe], machine, corpus_pipeline), record.variant(name, recipe) as variant:
        run_record = corpus_pipeline(recipe, machine).model_copy(update={"name": name, "steps": tuple(variant.steps)})
        folder = report_folder(home(), name, [run_record])
        record.conclusion(variant.run_id, {}, [write_corpus_page(folder, name, [run_record])])
        link(name, folder, [variant.run_id])
    return Result([run_record], [], folder)


def show_corpus(result: Result) -> None:
    """Print what the corpus is and, last, the path of the page that shows it."""
    for role in ("corpus", "filtered", "selected_corpus"):
        artifact = result.only().artifacts[role]
        metadata = {
            k: f"{v:.4g}" if isinstance(v, float) else v for k, v in artifact.metadata.items() if v not in ("", {})
        }
        console.print(f"{role:8} {', '.join(f'{k} {v}' for k, v in metadata.items())}")
        console.print(f"         {Store(home()).whereabouts(artifact)}")
    print(result.folder / "corpus.html", flush=True)


def corpus_command(
    recipe: Annotated[Path, typer.Argument(help="A recipe in YAML")],
    set_: Set = [],  # noqa: B006
    machine: On = [],  # noqa: B006
    home: Home = None,
    plan: Plan = False,
) -> None:
    """Make the rehearsal corpus of a recipe, and a page that shows it; train nothing."""
    make_corpus(Recipe.load(recipe, set_), machine_of(machine), plan=plan)


def make_corpus(recipe: Recipe, machine: Machine, *, plan: bool) -> None:
    """Make the corpus and print what it is, or only what that would take."""
    if result := plan_or_run([recipe], machine, corpus_pipeline, lambda: corpus(recipe, machine), plan=plan):
        show_corpus(result)


if __name__ == "__main__":
    start(corpus_command)
