"""GateRuns: a recipe trained once for each fresh seed, and what the gate reads of these runs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from cfsd.baseline.file import Baseline, Measured, baseline_of
from cfsd.errors import BadInput
from cfsd.machine import home
from cfsd.overrides import override, validated
from cfsd.recipe import Recipe
from cfsd.report.run_record import RunRecord
from cfsd.statistics.gate import LEAST_SEEDS, USUAL_SEEDS
from cfsd.store.artifact import Store
from flows._conclude import Result
from flows._known_baseline import CHAMPION
from flows._verdict import RESEEDED, found_trained, origin
from tasks import registry


@dataclass(frozen=True)
class GateRuns:
    """The runs of a recipe's `seeds`, concluded, and the run in MLflow above them."""

    recipe: Recipe
    seeds: Sequence[int]
    result: Result
    run_id: str | None

    @cached_property
    def figures(self) -> list[dict[str, Measured]]:
        """Return the guarded figures of each run."""
        return [registry.guarded_figures(run_record) for run_record in self.result.run_records]

    @cached_property
    def seconds(self) -> list[float]:
        """Return the seconds of each training."""
        return [trained_seconds(run_record) for run_record in self.result.run_records]

    @cached_property
    def notes(self) -> list[str]:
        """Return what is to be said of trainings that were not made now."""
        return found_trained(Store(home()), self.result.run_records)

    def baseline(self, known: Baseline | None) -> Baseline:
        """Return these runs as a baseline, in place of a `known` one."""
        return baseline_of(self.recipe, self.seeds, self.figures, self.seconds, origin(known) if known else "")


def trained_seconds(run_record: RunRecord) -> float:
    """Return the seconds that training took when it ran."""
    return float(Store(home()).manifest(run_record.artifacts["tuned"])["seconds"])


def fresh_seeds(known: Baseline | None, given: str | None, seeds: int | None, *, update: bool) -> range:
    """Return the seeds to train with; a successor of the champion needs as many as a baseline.

    Raises:
        BadInput: Too few for a new baseline.
    """
    if update and seeds is not None and seeds < LEAST_SEEDS:
        raise BadInput(f"--seeds {seeds} is too few for a baseline; give {LEAST_SEEDS} or more")
    first = 0 if update or known is None else max(known.seeds) + 1
    usual = LEAST_SEEDS if update or given == CHAMPION else USUAL_SEEDS
    return range(first, first + (seeds or usual))


def reseeded(recipe: Recipe, number: int) -> Recipe:
    """Return the recipe with the seed `number` for corpus, order and training.

    Target split and probe stay, so that all seeds are measured on the same documents. Every seed has a corpus of
    its own, because another machine samples another one, too.
    """
    seeds = {f"{part}.seed": number for part in RESEEDED}
    changed = override(recipe.model_dump(mode="json"), {**seeds, "name": f"{recipe.name}: seed={number}"})
    return validated(Recipe, changed, f"seed {number}")


def reseeded_by_name(recipe: Recipe, numbers: Iterable[int]) -> dict[str, Recipe]:
    """Return the recipe once for each seed, by the name of its run."""
    return {f"{recipe.name} seed={number}": reseeded(recipe, number) for number in numbers}
