"""Variants at once: what each sees, what is made once, what an error, a kill and Ctrl-C leave."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from cfsd.errors import BadInput, Crashed, NotFinite
from cfsd.machine import Machine
from cfsd.recipe import Recipe
from cfsd.store.artifact import Store
from tests.conftest import ROOT, see_gpus
from tests.flows.trial_flow import trial
from tests.served import ask
from tests.tasks.test_record import elsewhere, runs

ONE = Machine(device="cpu", threads=1)


@pytest.mark.parametrize(
    ("machine", "devices"),
    [
        (Machine(), 4),
        (Machine(devices=3), 3),
        (Machine(device="cpu"), 1),
        (Machine(device="cpu", devices=6), 6),
        (Machine(training_processes=4), 1),  # a variant takes all of them, as before
        (Machine(cluster="auto"), 1),
    ],
)
def test_as_many_variants_run_at_once_as_there_are_devices(
    machine: Machine, devices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    see_gpus(monkeypatch, 4)
    assert machine.resolved_devices() == devices


def test_a_variant_that_runs_beside_others_sees_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    see_gpus(monkeypatch, 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    own = Machine(devices=4).one_of(4)
    assert (own.devices, own.threads) == (1, 4)
    assert Machine(threads=3).one_of(4).threads == 3
    see_gpus(monkeypatch, 1)  # as CUDA_VISIBLE_DEVICES makes it
    assert (own.resolved_training_processes(), own.resolved_processes()) == (1, 1)


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        (Machine(devices=5), "machine.devices is 5, but 4 GPU"),
        (Machine(devices=2, training_processes=2), "machine.training_processes=2 wants several"),
        (Machine(devices=2, sharding="shard"), "machine.sharding=shard wants several"),
    ],
)
def test_devices_that_cannot_be_had_are_refused_before_anything_runs(
    machine: Machine, said: str, monkeypatch: pytest.MonkeyPatch, recipe_file: Path, home: Path
) -> None:
    from flows._plan import checked
    from flows.mitigate import pipeline

    see_gpus(monkeypatch, 4)
    with pytest.raises(BadInput, match=said), checked([Recipe.load(recipe_file)], machine, pipeline):
        pass
    assert not (home / "store" / "model").exists()


def test_the_plan_says_between_what_times_it_takes() -> None:
    from flows._plan import at_once

    assert "on 3 at once between 5 minutes, if the work divides evenly, and 15," in at_once(900, 200, 3)
    assert "between 7 minutes" in at_once(900, 400, 3), "no sooner than the longest variant"


def test_two_comparisons_never_share_a_device(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from flows._parallel import claimed

    with ExitStack() as one, ExitStack() as other:
        assert claimed(["0", "1", "2"], 2, one) == ["0", "1"]
        assert claimed(["0", "1", "2"], 2, other) == ["2"]
        assert "1 of 2 devices are used by other comparisons" in capsys.readouterr().out
        one.close()
        with ExitStack() as third:
            assert claimed(["0", "1", "2"], 3, third) == ["0", "1"]


def states(server: str, above: Any) -> dict[str, str]:
    """Return the states of the flow runs below a flow run, by name."""
    below = {"flow_runs": {"parent_flow_run_id": {"any_": [str(above)]}}}
    return {run["name"]: run["state_type"] for run in ask(f"{server}/api/flow_runs/filter", below)}


def test_each_has_a_process_and_a_device_and_what_ends_one_spares_the_others(
    server: str, home: Path, recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.context import FlowRunContext

    from flows._parallel import Slots
    from tasks._gpu_slots import GPU_SLOT, gpu_slots

    def of(*names: str) -> dict[str, Recipe]:
        return {name: Recipe.load(recipe_file, [f"name={name}"]) for name in names}

    @flow
    def study() -> Any:
        with Slots(2, Machine(), trial) as slots:
            good = slots.run(of("a", "b", "infinite", "c"), spared=(NotFinite,))
            with pytest.raises(BadInput, match=r"^wrong: the value is wrong$"):
                slots.run(of("wrong", "d", "e", "f"))
            with pytest.raises(Crashed, match=r"^killed: its process ended with code -9 .* run the same command again"):
                slots.run(of("killed", "g"))
            context = FlowRunContext.get()
            assert context and context.flow_run
            return good, context.flow_run.id

    see_gpus(monkeypatch, 2)
    good, above = study()
    assert list(good) == ["a", "b", "infinite", "c"] and isinstance(good.pop("infinite"), NotFinite)
    devices, processes = ({made.digest.split()[part] for made in good.values()} for part in (0, 2))
    assert devices == {"0", "1"} and len(processes) == 2 and str(os.getpid()) not in processes
    found = states(server, above)
    assert [found.pop(name) for name in ("infinite", "wrong", "killed")] == ["FAILED", "FAILED", "CRASHED"]
    assert set(found) - {"e"} == {"a", "b", "c", "d", "g"} and set(found.values()) == {"COMPLETED"}  # f never began
    told = capsys.readouterr().out.splitlines()
    assert "killed | error: its process ended with code -9" in "\n".join(told)
    assert any(line.startswith("d     | works with ") for line in told)
    assert not [p for p in psutil.Process().children() if "flows._variant_process" in p.cmdline()]
    assert gpu_slots(Machine()) == 2, "as many as the machine that made the limit sees"
    with get_client(sync_client=True) as client:
        client.delete_global_concurrency_limit_by_name(GPU_SLOT)


def test_what_has_ended_stays_as_it_ended_whatever_its_process_does_next(
    server: str, home: Path, recipe_file: Path
) -> None:
    from prefect import flow
    from prefect.context import FlowRunContext

    from flows._parallel import Slots, _that_speak

    @flow
    def study() -> Any:
        with Slots(1, Machine(device="cpu", threads=1), trial) as slots:
            slots.run({"a": Recipe.load(recipe_file, ["name=a"])})
            (idle,) = slots.processes
            idle.process.kill()
            while idle.answers.open:
                for process in _that_speak(slots.processes):
                    assert process.hear(slots._tell) is None
            with pytest.raises(Crashed, match="the processes that run variants ended"):
                slots.run({"b": Recipe.load(recipe_file, ["name=b"])})
            context = FlowRunContext.get()
            assert context and context.flow_run
            return context.flow_run.id

    assert states(server, study()) == {"a": "COMPLETED"}


def test_an_interrupt_stops_all_that_run_and_begins_no_other(server: str, home: Path, recipe_file: Path) -> None:
    from prefect import flow
    from prefect.context import FlowRunContext

    from flows._parallel import Slots

    above: list[Any] = []

    def interrupt() -> None:
        while len(list(home.glob("*.begun"))) < 2:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    @flow
    def study() -> None:
        context = FlowRunContext.get()
        assert context and context.flow_run
        above.append(context.flow_run.id)
        names = [f"waits {number}" for number in range(3)]
        with Slots(2, ONE, trial) as slots:
            threading.Thread(target=interrupt, daemon=True).start()
            slots.run({name: Recipe.load(recipe_file, [f"name={name}"]) for name in names})

    with pytest.raises(KeyboardInterrupt):
        study()
    assert {file.name: file.read_text() for file in home.glob("*.stopped")} == {
        "waits 0.stopped": "KeyboardInterrupt", "waits 1.stopped": "KeyboardInterrupt",
    }  # fmt: skip
    assert states(server, above[0]) == {"waits 0": "CRASHED", "waits 1": "CRASHED"}
    assert not [p for p in psutil.Process().children() if "flows._variant_process" in p.cmdline()]


# --- the real thing ------------------------------------------------------------------------------------------------

TWO = ["--machine", "threads=1", "--machine", "devices=2", "--machine", "checkpoint_steps=40"]
VARIANTS = {"finetune": {"generate.rows": 0}, "rehearse": {}, "strong": {"train.rehearsal.weight": 3.0}}


@pytest.fixture
def comparison_file(recipe_file: Path) -> Path:
    recipe = yaml.safe_load(recipe_file.read_text()) | {"mix": {"target_rows": 1}}
    recipe["train"]["epochs"] = 24  # two trainings must be in their middle at one time
    file = recipe_file.with_name("comparison.yaml")
    file.write_text(yaml.safe_dump({"recipe": recipe, "variants": VARIANTS}))
    return file


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(server: str, comparison_file: Path, tmp_path: Path) -> Iterator[Start]:
    started = []

    def call(home: Path, *words: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "flows.compare", str(comparison_file), "--home", str(home), *words]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
            env=elsewhere(tmp_path / f"{home.name}.db"),
        )  # fmt: skip
        started.append(process)
        return process

    yield call
    for process in started:
        process.kill()


def contents(home: Path) -> dict[str, str]:
    """Return the content of every artifact in a store, by kind and key."""
    store = Store(home)
    return {
        f"{path.parent.parent.name} {path.parent.name}": json.loads(path.read_text())["content"]
        for path in store.root.glob("*/*/manifest.json")
    }


def made(out: str, stage: str) -> list[str]:
    """Return the keys of the artifacts that `stage` was executed for, according to what a comparison printed."""
    words = [line.partition(" | ")[2].split() or line.split() for line in out.splitlines()]
    return [word[1] for word in words if len(word) > 3 and word[0] == stage and word[3].startswith("s")]


def middle(home: Path, process: "subprocess.Popen[str]") -> dict[Path, psutil.Process]:
    """Wait until two trainings are in their middle; return the processes of their variants by draft."""
    end = time.monotonic() + 400
    while time.monotonic() < end:
        assert process.poll() is None, process.stdout and process.stdout.read()
        found = {
            draft: child.parent()
            for child in psutil.Process(process.pid).children(recursive=True)
            for draft in (home / "store" / "model").glob("*.draft")
            if str(draft) in _command(child) and list(draft.glob("checkpoints/checkpoint-*/trainer_state.json"))
        }
        if len(found) == 2:
            return found  # type: ignore[return-value]
        time.sleep(0.05)
    raise AssertionError("no two trainings at once")


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.mark.slow
def test_two_at_once_make_what_one_after_the_other_makes_and_each_thing_once(start: Start, tmp_path: Path) -> None:
    serial, parallel = tmp_path / "serial", tmp_path / "parallel"
    outputs = {}
    for home, words in ((serial, TWO[:2]), (parallel, TWO)):
        process = start(home, *words)
        outputs[home], _ = process.communicate(timeout=900)
        assert process.returncode == 0, outputs[home]
    assert contents(serial) == contents(parallel)
    for stage, times in {"fetch": 1, "probe": 1, "generate": 2, "train": 3, "evaluate-target": 4}.items():
        keys = [made(outputs[home], stage) for home in (serial, parallel)]
        assert sorted(keys[0]) == sorted(keys[1]) and len(set(keys[1])) == len(keys[1]) == times, (stage, keys)
    assert "waiting for another process that makes model" in outputs[parallel]
    found = runs(tmp_path / "parallel.db")
    above = [run.info.run_id for run in found if run.data.tags["cfsd.kind"] == "comparison"]
    variants = [run for run in found if run.data.tags["cfsd.kind"] == "variant"]
    assert len(variants) == 3 and {run.data.tags["mlflow.parentRunId"] for run in variants} == set(above)
    assert {run.info.status for run in found} == {"FINISHED"}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_kill_or_ctrl_c_leaves_drafts_that_the_same_command_continues(
    how: str, start: Start, tmp_path: Path, server: str
) -> None:
    home, whole = tmp_path / "data", tmp_path / "whole"
    process = start(home, *TWO)
    drafts = middle(home, process)
    if how == "kill":
        next(iter(drafts.values())).kill()
    else:
        process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=400)
    assert process.returncode == (1 if how == "kill" else 130), out
    assert all(draft.exists() for draft in list(drafts)[: 1 if how == "kill" else 2])
    last = "run the same command again" if how == "kill" else f"python -m flows.compare {tmp_path}"
    assert last in out.strip().splitlines()[-1], out
    assert not [p for p in psutil.process_iter() if str(home) in _command(p)]
    statuses = [run.info.status for run in runs(tmp_path / "data.db")]
    assert "RUNNING" not in statuses and "KILLED" in statuses
    named = {"flow_runs": {"name": {"like_": "mine: "}}}
    assert {r["state_type"] for r in ask(f"{server}/api/flow_runs/filter", named)} <= {
        "COMPLETED", "CRASHED", "CANCELLED", "FAILED",
    }  # fmt: skip
    for place, words in ((home, TWO), (whole, TWO[:2])):
        again = start(place, *words)
        out, _ = again.communicate(timeout=900)
        assert again.returncode == 0, out
    assert contents(home) == contents(whole)
    files = (home / "store" / "model").glob("*/manifest.json")
    models = [json.loads(path.read_text())["metadata"] for path in files]
    continued = [one["continued_from_step"] > 0 for one in models if "continued_from_step" in one]
    assert len(continued) == 3 and sum(continued) == (1 if how == "kill" else 2)
