"""Several targets in turn, each trained on the model before: what is left of the earlier ones, and of the base?

python -m flows.continual deployments/recipes/tiny-sequence.yaml
"""

from pathlib import Path

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from cfsd.artifact import Artifact, Store
from cfsd.continual import Continual, Stability
from cfsd.machine import Machine, home
from cfsd.recipe import Recipe
from cfsd.summary import Trail
from cfsd.target_sequence import TargetSequence, trained_on
from flows._conclude import conclude, report_folder
from flows.mitigate import mitigate
from tasks import record
from tasks.evaluate import Role, evaluate_target

ROLES: tuple[Role, Role] = ("base", "tuned")


@flow(name="continual", flow_run_name="{sequence.recipe.name}")
def continual(sequence: TargetSequence, machine: Machine = Machine()) -> list[Trail]:  # noqa: B008
    """Train on one target after another; every stage is a `mitigate` run, and every model is scored on every target."""
    title = sequence.recipe.name
    with record.comparison(title) as run_id:
        trails = stages(sequence, machine)
        targets, general = measured(trails, sequence.recipe, machine)
        conclude(title, trails, [run_id], notes=told(targets))
        file = written(report_folder(title, trails), title, targets, general)
        record.conclusion(run_id, None, [file, file.with_suffix(".json")])
        text = file.read_text()
        create_markdown_artifact(text, key=f"{file.parent.name}-continual")
        record.say(text)
    return trails


def stages(sequence: TargetSequence, machine: Machine) -> list[Trail]:
    """Train on each target, on what the one before gave."""
    trails: list[Trail] = []
    for name, recipe in sequence.recipes().items():
        on = trained_on(recipe, Store(home()).path(trails[-1].artifacts["final"])) if trails else recipe
        trails.append(mitigate(on, machine).model_copy(update={"name": name}))
    return trails


def measured(trails: list[Trail], recipe: Recipe, machine: Machine) -> tuple[Continual, list[Stability]]:
    """Score every stage's model on every target's held-out rows; stage 0 is the first base."""
    from cfsd.sequence_figures import kept_of_benchmarks, kept_of_targets

    models = [trails[0].artifacts["base"], *(trail.artifacts["final"] for trail in trails)]
    scored: dict[tuple[int, str], Artifact] = {}
    for stage, model in enumerate(models):
        for trail in trails:
            target, role = trail.artifacts["target"], ROLES[bool(stage)]
            scored[stage, trail.name] = evaluate_target(model, target, recipe.evaluate.held_out_rows, role, machine)
    store = Store(home())
    return kept_of_targets(store, [trail.name for trail in trails], scored), kept_of_benchmarks(store, trails)


def told(targets: Continual) -> list[str]:
    """Return the figures in a line each, for the report."""
    from cfsd.table import shown

    lines = [
        f"{name.replace('_', ' ')} over {len(targets.targets)} targets: {shown(figure.model_dump())} {targets.unit} "
        f"({targets.definitions[name]})"
        for name in ("backward_transfer", "average_forgetting")
        if (figure := getattr(targets, name))
    ]
    return [*lines, "Each variant here is a stage: its base is the model of the stage before."]


def written(folder: Path, title: str, targets: Continual, general: list[Stability]) -> Path:
    """Write continual.md and continual.json; return the first."""
    from cfsd.content import write_json
    from cfsd.continual import described

    file = folder / "continual.md"
    figures: list[Continual | Stability] = [targets, *general]
    text = "\n\n".join(f"```\n{described(found)}\n```" for found in figures)
    file.write_text(f"# {title}: targets in turn\n\n{text}\n")
    content = {"targets": targets.model_dump(mode="json"), "benchmarks": [s.model_dump(mode="json") for s in general]}
    write_json(file.with_suffix(".json"), content)
    return file


if __name__ == "__main__":
    from flows._cli import continual_command, start

    start(continual_command)
