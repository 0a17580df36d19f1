"""Variants and their steps: a step is one run in MLflow, whoever took it, and its variants link to it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from cfsd.machine import home
from cfsd.recipe import Recipe
from cfsd.report.recipe_text import readable_yaml
from cfsd.report.run_record import Step
from cfsd.stages import FILTER, GENERATE, MIX, SELECT
from cfsd.store.artifact import Artifact, Store
from cfsd.store.journal import read_metrics
from cfsd.store.locks import held
from tasks.record.client import say, tracked
from tasks.record.description import NOTE, described
from tasks.record.parameters import chosen
from tasks.record.runs import describe, end_dead_runs, ended, open_run, open_step
from tasks.record.step_run import IN_BRIEF, StepRun

if TYPE_CHECKING:
    from tasks.record.server import Server

T = TypeVar("T")


class Taken(NamedTuple):
    """A step that was taken; `has_run`: it has a run of its own in MLflow."""

    run: StepRun
    artifact: Artifact
    executed: bool
    seconds: float
    has_run: bool


class Variant:
    """One way of training, as an MLflow parent run and a list of steps."""

    def __init__(self, name: str, run_id: str | None) -> None:
        """Start with no steps; `run_id` is None when MLflow is away."""
        self.name = name
        self.run_id = run_id
        self.taken: list[Taken] = []
        self.told = ""  # what its description says above its steps

    @property
    def steps(self) -> list[Step]:
        """Its steps, as a run record has them."""
        return [
            Step(stage=t.run.stage, artifact=t.artifact, executed=t.executed, seconds=t.seconds) for t in self.taken
        ]


current_variant: ContextVar[Variant | None] = ContextVar("variant", default=None)
_comparison: ContextVar[str | None] = ContextVar("comparison", default=None)


@contextmanager
def comparison(name: str) -> Iterator[str | None]:
    """Open the MLflow run above several variants."""
    tracked(end_dead_runs)
    run_id = tracked(lambda server: open_run(server, name, None, {"cfsd.kind": "comparison"}))
    with ended(run_id), _as_current(_comparison, run_id):
        yield run_id


@contextmanager
def below(comparison: str | None) -> Iterator[None]:
    """Put the variants of this block below a comparison's run that another process opened."""
    with _as_current(_comparison, comparison):
        yield


@contextmanager
def variant(name: str, recipe: Recipe | None = None) -> Iterator[Variant]:
    """Open the MLflow parent run of one variant and collect the steps that are taken within."""
    tracked(end_dead_runs)
    tags = {"cfsd.kind": "variant"} | ({"cfsd.recipe": recipe.digest()} if recipe else {})
    run_id = tracked(lambda server: open_run(server, name, _comparison.get(), tags))
    say(name, style="bold")
    opened = Variant(name, run_id)
    with ended(run_id), _as_current(current_variant, opened):
        if recipe and run_id:
            tracked(lambda server: _log_recipe(server, run_id, recipe))
        try:
            yield opened
        finally:
            tracked(lambda server: _link_steps(server, opened))


@contextmanager
def _as_current(variable: ContextVar[T], value: T) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def _log_recipe(server: "Server", run_id: str, recipe: Recipe) -> None:
    server.log_all(run_id, parameters=chosen(recipe))
    server.log_text(run_id, readable_yaml(recipe.model_dump(mode="json")), "recipe.yaml")


def keep_step(
    stage: str, store: Store, artifact: Artifact, inputs: Mapping[str, Any], *, executed: bool, gpu: bool
) -> None:
    """Note a step of the variant at hand, on the terminal and in MLflow."""
    seconds = float(store.manifest(artifact)["seconds"])
    how = f"{seconds:.0f} s" if executed else "cached"
    say(f"{stage} {artifact.key} {how}{_in_brief(artifact.metadata)}")
    if (variant := current_variant.get()) is None:
        return
    taken = Taken(StepRun(stage, artifact.key, inputs), artifact, executed, seconds, gpu)
    variant.taken.append(taken)
    if gpu and executed and variant.run_id:
        tracked(lambda server: run_of(server, variant, taken))


def _in_brief(metadata: Mapping[str, Any]) -> str:
    words = [str(metadata["benchmark"])] if "benchmark" in metadata else []
    for name in IN_BRIEF:
        if isinstance(value := metadata.get(name), int | float):
            words.append(f"{value:,.4g} {name.replace('_', ' ')}" if isinstance(value, float) else f"{value:,} {name}")
    return ": " + ", ".join(words) if words else ""


def run_of(server: "Server", variant: Variant, taken: Taken) -> str:
    """Return the run of a step, the only one that holds all of it; what is missing of it is added from the artifact."""
    from tasks.record.contents import ALL, fill
    from tasks.record.server import RECORDED

    key, store = taken.run.key, Store(home())
    if (known := server.step(key)) and known.tags.get(RECORDED) == ALL:
        return known.run_id
    with held(store.root / ".locks" / f"run-of-{key}.lock", f"waiting for another process that records {key}", say):
        if known:  # another process may have filled it meanwhile
            server.know(key, known.run_id, server.get_run(known.run_id).data.tags)
        if (known := server.step(key)) and known.tags.get(RECORDED) == ALL:
            return known.run_id
        run_id = known.run_id if known else _replayed(server, variant, taken, store)
        fill(server, run_id, store, taken.run, taken.artifact)
        server.know(key, run_id, {RECORDED: ALL})
        return run_id


def runs_of(server: "Server", variant: Variant) -> None:
    """See to it that every step of a variant that has a run of its own has it, with all that belongs to it."""
    due = [taken for taken in variant.taken if taken.has_run]
    server.look_up([taken.run.key for taken in due])
    for taken in due:
        run_of(server, variant, taken)


def _replayed(server: "Server", variant: Variant, taken: Taken, store: Store) -> str:
    """Return a new run for a step that MLflow never saw, dated as when the step was executed."""
    ended_at = float(store.manifest(taken.artifact)["created"])
    run_id = open_step(server, taken.run, str(variant.run_id), "replayed", ended_at - taken.seconds)
    with ended(run_id, ended_at):
        describe(server, run_id, taken.run, store)
        server.log_metrics(run_id, read_metrics(store.path(taken.artifact, weights=False)))
    return run_id


def _link_steps(server: "Server", variant: Variant) -> None:
    """Put on the variant's run which artifact each step gave, and links to the runs that made them."""
    if variant.run_id is None:
        return
    runs_of(server, variant)
    lines = [_line(server, variant, taken) for taken in variant.taken]
    told = described(variant.told, *(["### Steps", "\n".join(lines)] if lines else []))
    tags = {name: text for taken in variant.taken for name, text in _tags(taken).items()}
    figures = {
        f"{t.run.stage}/{name}": value
        for t in variant.taken if t.run.stage in (GENERATE, FILTER, SELECT, MIX)
        for name, value in t.artifact.metadata.items() if isinstance(value, int | float)
    }  # fmt: skip
    server.log_all(variant.run_id, figures=figures, tags=tags | {NOTE: told})


def _line(server: "Server", variant: Variant, taken: Taken) -> str:
    """Return a step as an entry of a Markdown list, with a link to its run where it has one."""
    name, how = taken.run.name(), "executed" if taken.executed else "cached"
    shown = f"[{name}]({server.page(run_of(server, variant, taken))})" if taken.has_run else name
    return f"* {shown} `{taken.artifact.key}`, {how}, {taken.seconds:,.1f} s"


def _tags(taken: Taken) -> dict[str, str]:
    stage, metadata = taken.run.stage, taken.artifact.metadata
    name = metadata.get("benchmark") or metadata.get("prompts")
    tags = {f"cfsd.{stage}.{name}" if name else f"cfsd.{stage}": taken.artifact.key}
    for word in ("biased", "approximate"):  # in what the corpus is not an exact sample of the base
        if stage == GENERATE and metadata.get(word):
            tags[f"cfsd.{word}"] = str(metadata[word])
    return tags
