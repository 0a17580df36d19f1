"""A training that is killed, then asked to stop, then let run, gives the bits of one that ran through."""

import json
import random
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from cfsd.errors import CfsdError, Crashed, NotFinite, Stopped
from cfsd.machine import Machine
from cfsd.store.artifact import CHECKPOINTS, Artifact, Store
from cfsd.store.journal import read_metrics
from cfsd.train import trainer
from cfsd.train.methods import Methods
from cfsd.train.spec import TrainSpec
from cfsd.train.stage import train
from cfsd.train.trainer import fit
from tests.conftest import write_rows
from tests.train.test_train import World, request_of, signals_given_back, trained, world_in

pytestmark = pytest.mark.processes

MACHINE = Machine(device="cpu", threads=1, checkpoint_steps=5)
TWO = Machine(device="cpu", threads=1, checkpoint_steps=5, micro_batch_tokens=64, training_processes=2)
SPEC = TrainSpec.model_validate(  # all that has a state of its own
    {
        "learning_rate": 1e-3, "epochs": 16, "seed": 0, "rehearsal": {"loss": "kl", "budget": 0.01},
        "methods": {
            "l2": {"weight": 0.1}, "ewc": {"weight": 1.0, "rows": 20}, "dft": {"power": 0.5}, "eaft": {"power": 0.5},
            "stm": {"threshold": 1000}, "target_divergence": {"weight": 0.1, "top_logprobs": 8},
        },
        "watch": {"every": 7},
    }
)  # fmt: skip
ADAPTERS = [{"lora": {"rank": 4, "dropout": 0.1}}, {"osft": {"preserved": 0.5}}]
KEY = "interrupted"
STEPS = 5 * SPEC.epochs


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> World:
    folder = tmp_path_factory.mktemp("world")
    rows = write_rows(folder / "rows.jsonl", count=48)
    return world_in(Store(folder / "data"), model_folder, rows, corpus_rows=400, rehearsal_tokens=32)


__all__ = ["signals_given_back"]  # a fixture that every test of this module uses too


def make(world: World, key: str, spec: TrainSpec = SPEC, machine: Machine = MACHINE) -> Artifact:
    """Train in processes of their own, as the stage does."""
    request, environment = request_of(world, world.mixture, spec, machine), machine.environment("train")
    return world.store.make("model", key, lambda draft: train(request, draft), environment=environment)[0]


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


def interrupted(
    begin: Callable[[], Artifact], draft: Path, act: Callable[[psutil.Process], object],
    wanted: Callable[[int, int], bool],
) -> CfsdError:  # fmt: skip
    """Do `act` to the child that trains when `wanted(written step, saved step)`; return what `begin` raised."""
    raised: list[CfsdError] = []

    def run() -> None:
        try:
            begin()
        except CfsdError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    wait_for(lambda: wanted(written_step(draft), saved_step(draft)) or not thread.is_alive())
    for child in psutil.Process().children():
        if {"cfsd.train.trainer", "cfsd.process.ranks"} & set(child.cmdline()):
            act(child)
    thread.join(120)
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
    begin = partial(make, world, KEY)
    assert isinstance(
        interrupted(begin, draft, psutil.Process.kill, lambda written, saved: written > saved > 3), Crashed
    )
    killed_at = saved_step(draft)
    stopped = interrupted(
        begin, draft, psutil.Process.terminate, lambda written, saved: written > saved > killed_at + 3
    )
    stopped_at = saved_step(draft)
    assert isinstance(stopped, Stopped)
    assert f"after step {stopped_at} of {STEPS}, which is saved" in str(stopped)
    assert killed_at < stopped_at < STEPS
    made = make(world, KEY)
    assert made.metadata["continued_from_step"] == stopped_at
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
    assert len({(r["step"], r["name"]) for r in records}) == len(records)
    return {(r["step"], r["name"]): r["value"] for r in records if "per_second" not in r["name"]}


def test_every_step_is_recorded_once_with_the_same_values(world: World, finished: Artifact, through: Artifact) -> None:
    """Lambda, the estimate, both penalties, the count of clipped steps and what was watched among them."""
    one, two = (recorded(world, model) for model in (finished, through))
    assert one == two
    last = {name: value for (step, name), value in two.items() if step == STEPS}
    assert {"train/penalty/l2", "train/penalty/ewc", "train/divergence_estimate", "watch/probe_kl"} <= set(last)
    assert last["train/clipped_steps"] > 0 and last["train/rehearsal_weight"] != 1.0


def test_the_facts_are_those_of_one_training(finished: Artifact, through: Artifact) -> None:
    one, two = (
        {name: value for name, value in model.metadata.items() if name not in ("continued_from_step", "peak_memory")}
        for model in (finished, through)
    )
    assert one == two and {"budget", "final_weight", "divergence_estimate"} <= set(one)


def test_a_training_stopped_early_and_killed_while_saving_stays_stopped(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = TrainSpec.model_validate(
        {"learning_rate": 1e-3, "epochs": 4, "seed": 0, "watch": {"every": 3, "stop_above": 1e-4}}
    )
    request = request_of(world, world.mixture, spec, MACHINE.model_copy(update={"checkpoint_steps": 3}))
    whole, cut = (tmp_path / name for name in ("whole", "cut"))
    for folder in (whole, cut):
        folder.mkdir()
    metadata = fit(whole, request)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(trainer, "_save", killed)
        fit(cut, request)
    again = fit(cut, request)
    assert metadata["stopped_at_step"] == again["stopped_at_step"] == again["continued_from_step"] == 3
    assert len({(folder / "model.safetensors").read_bytes() for folder in (whole, cut)}) == 1


@pytest.mark.slow
def test_what_ends_the_training_process_arrives_with_its_remedy(world: World) -> None:
    with pytest.raises(NotFinite, match=r"lower train\.learning_rate"):
        make(world, "explodes", TrainSpec(learning_rate=1e30, seed=0))
    error = json.loads((world.store.root / "model" / "explodes.draft" / "error.json").read_text())
    assert error["kind"] == "not_finite"


def same_model(world: World, one: Artifact, two: Artifact) -> None:
    folders = [world.store.path(model) for model in (one, two)]
    weights = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]
    assert one.content == two.content
    assert recorded(world, one) == recorded(world, two)


@pytest.mark.slow
@pytest.mark.parametrize("methods", ADAPTERS, ids=lambda methods: next(iter(methods)))
def test_an_adapter_that_was_killed_goes_on_to_the_same_bits(methods: dict[str, Any], world: World) -> None:
    name, spec = next(iter(methods)), SPEC.model_copy(update={"methods": Methods.model_validate(methods)})
    draft = world.store.root / "model" / f"killed {name}.draft"
    begin = partial(make, world, f"killed {name}", spec)
    killed = interrupted(begin, draft, psutil.Process.kill, lambda written, saved: written > saved > 3)
    assert isinstance(killed, Crashed)
    made = make(world, f"killed {name}", spec)
    assert made.metadata["continued_from_step"] != 0
    same_model(world, made, trained(world, f"whole {name}", world.mixture, spec, MACHINE))


@pytest.mark.slow
@pytest.mark.parametrize("machine", [MACHINE, TWO], ids=["one process", "two processes"])
def test_killed_at_ten_random_steps_the_bits_are_those_of_one_training(world: World, machine: Machine) -> None:
    """The step at which the kill arrives is random by itself too: a training does several in a poll."""
    processes = machine.resolved_training_processes()
    key, steps = f"ten kills {processes}", sorted(random.Random(processes).sample(range(2, STEPS - 6), 10))
    draft, begin = world.store.root / "model" / f"{key}.draft", partial(make, world, key, SPEC, machine)
    for step in steps:
        killed = interrupted(begin, draft, psutil.Process.kill, lambda written, _, step=step: written >= step)
        assert isinstance(killed, Crashed)
        print("killed after step", written_step(draft))
    same_model(world, make(world, key, SPEC, machine), make(world, f"whole {processes}", SPEC, machine))
