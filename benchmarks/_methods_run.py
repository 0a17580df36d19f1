"""Run many recipes one after the other in one flow; what the store holds is not made again."""

import time
from collections.abc import Callable
from typing import NamedTuple

from cfsd.errors import NotFinite
from cfsd.machine import Machine, home
from cfsd.recipe import Recipe
from cfsd.report.run_record import RunRecord
from cfsd.store.artifact import Store
from flows._temporary_server import prefect_server
from flows.mitigate import pipeline
from tasks import record


class Cost(NamedTuple):
    """What training took, as recorded when it was done."""

    seconds: float
    peak_memory: int


class Runner:
    """Takes the pipelines of `total` recipes and says after each how long the rest may take."""

    def __init__(self, total: int, machine: Machine) -> None:
        """Begin to count."""
        self.total, self.machine = total, machine
        self.done = 0
        self.taken: list[float] = []  # seconds of those that really trained
        self.store = Store(home())

    def run(self, recipe: Recipe) -> RunRecord | None:
        """Take the whole pipeline of `recipe`; None where its training met numbers that are not finite."""
        started = time.time()
        try:
            run_record: RunRecord | None = pipeline(recipe, self.machine)
        except NotFinite as error:
            print(f"{recipe.name}: left out, {error}", flush=True)
            run_record = None
        self.done += 1
        taken = time.time() - started
        if run_record is None or self.made(run_record) >= started:
            self.taken.append(taken)
        print(f"[{self.done}/{self.total}] {recipe.name}: {taken:.0f} s, {self._left()}", flush=True)
        return run_record

    def made(self, run_record: RunRecord) -> float:
        """Return when the tuned model was made, in seconds of the epoch."""
        return float(self.store.manifest(run_record.artifacts["tuned"])["created"])

    def _left(self) -> str:
        if not self.taken:
            return "found in the store"
        left = sum(self.taken) / len(self.taken) * (self.total - self.done)
        return f"about {left / 60:.0f} min left"

    def cost(self, run_record: RunRecord) -> Cost:
        """Return what training the model of `run_record` took."""
        tuned = run_record.artifacts["tuned"]
        memory = tuned.metadata["peak_memory"]
        assert isinstance(memory, int | float)
        return Cost(float(self.store.manifest(tuned)["seconds"]), int(memory))


def in_one_flow(name: str, work: Callable[[], None]) -> None:
    """Do `work`, which takes pipelines, as a single flow run; the stages' own lines are left out."""
    from prefect import flow  # not above: it reads its settings when imported, and `flows` makes them

    record.console.quiet = True
    with prefect_server():
        flow(name=name, validate_parameters=False, persist_result=False)(work)()
