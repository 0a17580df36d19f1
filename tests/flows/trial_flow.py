"""A flow in the place of `mitigate` that ends as the name of its recipe says; for test_parallel."""

import os
import signal

from prefect import flow

from cfsd.errors import BadInput, NotFinite
from cfsd.machine import Machine
from cfsd.recipe import Recipe
from cfsd.report.run_record import RunRecord
from tasks import record


@flow(name="trial", flow_run_name="{recipe.name}")
def trial(recipe: Recipe, machine: Machine) -> RunRecord:
    """Return a run record whose digest tells what this process sees."""
    if "wrong" in recipe.name:
        raise BadInput("the value is wrong")
    if "infinite" in recipe.name:
        raise NotFinite("the loss is NaN")
    if "killed" in recipe.name:
        os.kill(os.getpid(), signal.SIGKILL)
    record.say(f"works with {machine.threads} thread(s)")
    return RunRecord(
        name="", digest=f"{os.environ.get('CUDA_VISIBLE_DEVICES')} {machine.devices} {os.getpid()}", artifacts={}
    )
