"""A flow in the place of `mitigate` that ends as the name of its recipe says; for test_parallel."""

import os
import signal
import time
from pathlib import Path

from prefect import flow

from cfsd.errors import BadInput, NotFinite
from cfsd.machine import Machine, home
from cfsd.recipe import Recipe
from cfsd.report.run_record import RunRecord
from tasks import record


def wait(place: Path) -> None:
    """Wait for an interrupt; write what happened beside `place`."""
    place.with_suffix(".begun").touch()
    try:
        time.sleep(600)
    except BaseException as error:
        place.with_suffix(".stopped").write_text(type(error).__name__)
        raise


@flow(name="trial", flow_run_name="{recipe.name}")
def trial(recipe: Recipe, machine: Machine) -> RunRecord:
    """Return a run record whose digest tells what this process sees."""
    if "wrong" in recipe.name:
        raise BadInput("the value is wrong")
    if "infinite" in recipe.name:
        raise NotFinite("the loss is NaN")
    if "killed" in recipe.name:
        os.kill(os.getpid(), signal.SIGKILL)
    if "waits" in recipe.name:
        wait(home() / recipe.name)
    record.say(f"works with {machine.threads} thread(s)")
    return RunRecord(
        name="", digest=f"{os.environ.get('CUDA_VISIBLE_DEVICES')} {machine.devices} {os.getpid()}", artifacts={}
    )
