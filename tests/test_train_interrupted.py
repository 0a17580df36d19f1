"""A training that is killed, then asked to stop, then let run, gives the bits of one that ran through."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cfsd.artifact import Artifact, Store
from cfsd.errors import CfsdError, Crashed, NotFinite, Stopped
from cfsd.journal import read_metrics
from cfsd.machine import Machine
from cfsd.train import TrainSpec, train
from cfsd.trainer import CHECKPOINTS
from tests.conftest import write_rows
from tests.test_train import World, signals_given_back, trained, world_in

MACHINE = Machine(device="cpu", threads=1, checkpoint_steps=5)
SPEC = TrainSpec(learning_rate=1e-3, epochs=16, seed=0)
KEY = "interrupted"
STEPS = 5 * SPEC.epochs


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> World:
    folder = tmp_path_factory.mktemp("world")
    return world_in(Store(folder / "data"), model_folder, write_rows(folder / "rows.jsonl", count=48))


__all__ = ["signals_given_back"]  # a fixture that every test of this module uses too


def make(world: World, key: str, spec: TrainSpec = SPEC) -> Artifact:
    return world.store.make("model", key, lambda draft: train(world.base, world.mixture, spec, draft, MACHINE))[0]


def saved_step(draft: Path) -> int:
    """Return the step of the newest whole checkpoint."""
    steps = [0]
    for path in (draft / CHECKPOINTS).glob("checkpoint-*/trainer_state.json"):
        try:
            steps.append(int(json.loads(path.read_text())["global_step"]))
        except (FileNotFoundError, json.JSONDecodeError):  # being written, or just deleted
            continue
    return max(steps)


def written_step(draft: Path) -> int:
    """Return the last step in the journal."""
    return max((int(record["step"]) for record in read_metrics(draft)), default=0)


def interrupted(world: World, number: signal.Signals, after_step: int) -> CfsdError:
    """Send `number` to the training process a step after a whole checkpoint; return what make raised."""
    raised: list[CfsdError] = []

    def run() -> None:
        try:
            make(world, KEY)
        except CfsdError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    draft = world.store.root / "model" / f"{KEY}.draft"
    wait_for(lambda: written_step(draft) > saved_step(draft) > after_step or not thread.is_alive())
    for child in psutil.Process().children():
        if "cfsd.train" in child.cmdline():
            os.kill(child.pid, number)
    thread.join(60)
    assert raised, "the training ended before it was interrupted"
    return raised[0]


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture(scope="module")
def finished(world: World) -> Artifact:
    """The model of a training that was killed, continued, asked to stop, and continued to its end."""
    draft = world.store.root / "model" / f"{KEY}.draft"
    assert isinstance(interrupted(world, signal.SIGKILL, 3), Crashed)
    killed_at = saved_step(draft)
    stopped = interrupted(world, signal.SIGTERM, killed_at + 3)
    stopped_at = saved_step(draft)
    assert isinstance(stopped, Stopped)
    assert f"after step {stopped_at} of {STEPS}, which is saved" in str(stopped)
    assert killed_at < stopped_at < STEPS
    made = make(world, KEY)
    assert made.facts["continued_from_step"] == stopped_at
    return made


@pytest.fixture(scope="module")
def through(world: World) -> Artifact:
    """The model of the same training, in this process and in one go."""
    return trained(world, "uninterrupted", world.mixture, SPEC, MACHINE)


def test_interrupted_and_uninterrupted_weights_are_bit_equal(
    world: World, finished: Artifact, through: Artifact
) -> None:
    assert (world.store.path(finished) / CHECKPOINTS).exists() is False
    one, two = (world.store.path(model) / "model.safetensors" for model in (finished, through))
    assert one.read_bytes() == two.read_bytes()
    assert finished.content == through.content


def recorded(world: World, model: Artifact) -> dict[tuple[int, str], float]:
    records = list(read_metrics(world.store.path(model)))
    steps = [record["step"] for record in records if record["name"] == "train/loss"]
    assert steps == list(range(1, STEPS + 1))
    return {(r["step"], r["name"]): r["value"] for r in records if "per_second" not in r["name"]}


def test_every_step_is_recorded_once_with_the_same_values(world: World, finished: Artifact, through: Artifact) -> None:
    one, two = (
        {key: value for key, value in recorded(world, model).items() if key[1] != "train/clipped_steps"}
        for model in (finished, through)
    )
    assert one == two


def test_the_count_of_clipped_steps_goes_on(world: World, finished: Artifact, through: Artifact) -> None:
    one, two = (recorded(world, model)[STEPS, "train/clipped_steps"] for model in (finished, through))
    assert two > 0
    assert one == two


def test_what_ends_the_training_process_arrives_with_its_remedy(world: World) -> None:
    with pytest.raises(NotFinite, match=r"lower train\.learning_rate"):
        make(world, "explodes", SPEC.model_copy(update={"learning_rate": 1e30}))
    error = json.loads((world.store.root / "model" / "explodes.draft" / "error.json").read_text())
    assert error["kind"] == "not_finite"
