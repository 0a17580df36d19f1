"""Run many recipes in one flow, as many at once as there are devices; what the store holds is not made again."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

from cfsd.errors import NotFinite
from cfsd.machine import Machine, home
from cfsd.overrides import override, parse_overrides, validated
from cfsd.recipe import Recipe
from cfsd.report.run_record import RunRecord
from cfsd.store.artifact import Store
from flows._parallel import Slots, VariantResult, take
from flows._temporary_server import prefect_server
from flows.mitigate import pipeline
from tasks import record


class Cost(NamedTuple):
    """What training took, as recorded when it was done."""

    seconds: float
    peak_memory: int


class Runner:
    """Takes the pipelines of `total` recipes, as many at once as the machine has devices, and says how long they take.

    Within its block; on one device they are taken in this process, one after the other.
    """

    def __init__(self, total: int, machine: Machine) -> None:
        """Begin to count."""
        self.total, self.machine, self.count = total, machine, machine.resolved_devices()
        self.done = self.trained = 0  # those that really trained
        self.store = Store(home())

    def __enter__(self) -> Self:
        """Start the processes, if there is more than one device."""
        self.started = time.time()
        self.slots = Slots(self.count, self.machine, take).__enter__() if self.count > 1 else None
        return self

    def __exit__(self, *raised: Any) -> None:
        """End them."""
        if self.slots:
            self.slots.__exit__(*raised)

    def run_all(self, recipes: Sequence[Recipe]) -> list[RunRecord | None]:
        """Take the whole pipelines of recipes with different names; None where numbers were not finite."""
        if self.slots:
            found = self.slots.run({recipe.name: recipe for recipe in recipes}, (NotFinite,), self._say)
        else:
            found = {recipe.name: self._alone(recipe) for recipe in recipes}
        return [made if isinstance(made, RunRecord) else None for made in found.values()]

    def _alone(self, recipe: Recipe) -> VariantResult:
        try:
            content: VariantResult = pipeline(recipe, self.machine)
        except NotFinite as error:
            content = error
        self._say(recipe.name, content)
        return content

    def _say(self, name: str, content: VariantResult) -> None:
        self.done += 1
        if isinstance(content, NotFinite):
            print(f"{name}: left out, {content}", flush=True)
        if not isinstance(content, RunRecord) or self.made(content) >= self.started:
            self.trained += 1
        print(f"[{self.done}/{self.total}] {name}: {self._left()}", flush=True)

    def made(self, run_record: RunRecord) -> float:
        """Return when the tuned model was made, in seconds of the epoch."""
        return float(self.store.manifest(run_record.artifacts["tuned"])["created"])

    def _left(self) -> str:
        if not self.trained:
            return "found in the store"
        left = (time.time() - self.started) / self.trained * (self.total - self.done)
        return f"about {left / 60:.0f} min left"

    def cost(self, run_record: RunRecord) -> Cost:
        """Return what training the model of `run_record` took."""
        tuned = run_record.artifacts["tuned"]
        memory = tuned.metadata["peak_memory"]
        assert isinstance(memory, int | float)
        return Cost(float(self.store.manifest(tuned)["seconds"]), int(memory))


def changed_machine(machine: Machine, changes: list[str]) -> Machine:
    """Return a study's machine with what `--machine` changes of it. Raises BadInput."""
    return validated(Machine, override(machine.model_dump(mode="json"), parse_overrides(changes)), "--machine")


def in_one_flow(name: str, work: Callable[[], None]) -> None:
    """Do `work`, which takes pipelines, as a single flow run; the stages' own lines are left out."""
    from prefect import flow  # not above: it reads its settings when imported, and `flows` makes them

    record.console.quiet = True
    with prefect_server():
        flow(name=name, validate_parameters=False, persist_result=False)(work)()
