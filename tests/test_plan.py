"""The plan's times are those that stages took, in recorded runs and a real one; what it says of what is not here."""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from huggingface_hub import constants
from rich.console import Console

from cfsd.comparison import Comparison
from cfsd.errors import NotHere
from cfsd.estimate import (
    CHECKED,
    COMMAND_SECONDS,
    KEPT_BYTES,
    KNOWN_SHAPES,
    STAGE_SECONDS,
    disk_bytes,
    estimate,
    job_of,
    rate_of,
)
from cfsd.machine import Machine, lacking
from cfsd.model.folder import count_parameters
from cfsd.recipe import Recipe
from cfsd.stages import CHAT, EVALUATE_CHAT, EVALUATE_PROBE, EVALUATE_TARGET, FETCH, FISHER, GENERATE, SHOW, TRAIN
from cfsd.store.artifact import Artifact
from flows._plan import Plan, _disk_bytes, checked, costs, print_plans, walk
from flows.mitigate import pipeline
from tests.conftest import ROOT, write_rows

RECIPES = ROOT / "deployments/recipes"
RATE = 224e9  # FLOPs a second of a product of 1024 x 1024 on the machine of the recorded runs, two CPU cores
SHORT = 1.0  # seconds; what a stage takes beside its work is not planned finer
BEFORE = ["target", "generate", "filter", "probe", "mix", *["evaluate"] * 5, "evaluate-target"]
AFTER = ["train", *["evaluate"] * 5, "evaluate-target", "evaluate-target-divergence", "evaluate-probe"]
STAGES = ["fetch", *BEFORE, *AFTER, "generate", "filter", "mix", "check", *AFTER]
NEWER = (SHOW, CHAT, EVALUATE_CHAT)  # than the recorded runs
# They are older than the demo's benchmarks, than stored samples of the tail, and than choices that share one reading.
CHOICES = ", ".join(f"{{name: {name}, limit: 50}}" for name in ("agreement", "facts", "plausibility", "wording"))
OF_THEN = {
    "demo": [f"evaluate.benchmarks=[{CHOICES}, {{name: technical_english, limit: 20}}]", "generate.tail_samples=0"],
    "demo-tiny": ["generate.tail_samples=0"],
}
RECORDED = {
    "demo": (
        [
            17.6, 0.1, 0.3, 0, 13.3, 0, 2.6, 1.6, 2.1, 1.1, 3.9, 4.2, 70.4, 2.4, 1.6, 2.2, 1.5, 3.8, 4.3, 8.7, 22.1,
            16.1, 0, 0, 0.1, 104.1, 2.3, 2.2, 2.1, 1.1, 3.5, 4.2, 8.9, 19.9,
        ],
        368.6,
    ),
    "demo-tiny": (
        [
            1.7, 0, 0.3, 0, 0.2, 0, 0.8, 0.2, 0.2, 0.2, 0.2, 0, 8.9, 0.2, 0.2, 0.2, 0.2, 0.2, 0, 0.1, 0.1,
            0.9, 0, 0, 0.1, 12.0, 0.2, 0.2, 0.2, 0.2, 0.2, 0.1, 0.1, 0.1,
        ],
        61.3,
    ),
}  # fmt: skip


def planned(name: str, rate: float, changes: list[str]) -> list[tuple[str, float]]:
    """Return stages and seconds that the plan of a recipe of the repository says, in an empty data folder."""
    machine = Machine(device="cpu", threads=2)
    recipes = Comparison.load(RECIPES / f"{name}.yaml", changes).recipes().values()
    plans = [walk(recipe, machine, pipeline) for recipe in recipes]
    return [(step.stage, cost.seconds or 0) for step, cost in costs(plans, machine, rate)]


def factor(one: float, other: float) -> float:
    return max(one, other) / min(one, other)


@pytest.mark.parametrize("name", RECORDED)
def test_each_stage_took_what_its_plan_says(home: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(ROOT)
    seconds, whole = RECORDED[name]
    told = [(stage, plan) for stage, plan in planned(name, RATE, OF_THEN[name]) if stage not in NEWER]
    assert [stage for stage, _ in told] == STAGES
    apart = {
        f"{place} {stage}": (round(plan, 1), taken)
        for place, ((stage, plan), taken) in enumerate(zip(told, seconds, strict=True))
        if factor(plan + 1e-9, taken + 1e-9) > CHECKED and abs(plan - taken) > SHORT
    }
    assert not apart
    assert factor(COMMAND_SECONDS + sum(plan + STAGE_SECONDS for _, plan in told), whole) < CHECKED


@pytest.mark.slow
def test_a_run_of_the_small_demo_takes_what_its_plan_says(tmp_path: Path, server: str) -> None:
    """The rate is measured before the run and after it; in between other programs may take a part of the machine."""
    command = [sys.executable, "-m", "flows.compare", "deployments/recipes/demo-tiny.yaml", "--home", str(tmp_path)]
    before = rate_of(Machine(device="cpu"))
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    told = planned("demo-tiny", before, [])
    taken = sorted(taken_by(tmp_path / "store"), reverse=True)
    longest = sorted((seconds for _, seconds in told), reverse=True)[: len(taken)]
    print([(round(one, 2), round(other, 2)) for one, other in zip(longest, taken, strict=True)])
    for plan, seconds in zip(longest, taken, strict=True):
        assert factor(plan + 1e-9, seconds + 1e-9) < CHECKED or abs(plan - seconds) < SHORT
    assert factor(sum(longest), sum(taken)) < CHECKED


def taken_by(store: Path) -> Iterator[float]:
    for manifest in store.glob("*/*/manifest.json"):
        yield float(json.loads(manifest.read_text())["seconds"])


CUDA = torch.cuda.is_available()


@contextmanager
def elsewhere() -> Iterator[None]:
    token = lacking.set([])
    yield
    lacking.reset(token)


class Planned(NamedTuple):
    stages: list[str]
    printed: str
    plan: Plan


@pytest.fixture
def plan_of(home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Planned]:
    """Plan a recipe of the repository where no hub answers, with overrides and settings of the machine."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def plan(name: str, *changes: str, **machine: Any) -> Planned:
        console, on = Console(record=True, width=400, file=io.StringIO()), Machine(**machine)
        recipe = Recipe.load(RECIPES / f"{name}.yaml", list(changes))
        with checked([recipe], on, pipeline, only_plan=True) as plans:
            print_plans(plans, on, console)
        return Planned([step.stage for step in plans[0].steps], console.export_text(), plans[0])

    return plan


EIGHT = {"device": "cuda", "processes": 8, "training_processes": 8, "sharding": "shard"}


@pytest.mark.parametrize(
    ("name", "chats", "machine"),
    [
        ("olmo-1b-metamath", False, {"device": "cuda"}), ("r1-distill-llama-8b-medreason", True, EIGHT),
        ("qwen3-8b-qlora", True, {"device": "cuda"}), ("smollm2-lora", True, {"device": "cpu"}),
    ],
)  # fmt: skip
def test_the_plans_of_published_settings_need_no_network_and_no_gpu(
    plan_of: Callable[..., Planned], name: str, chats: bool, machine: dict[str, Any]
) -> None:
    planned = plan_of(name, **machine)
    assert ("chat" in planned.stages, "evaluate-chat" in planned.stages) == (chats, chats)
    on = Machine(**machine)
    with elsewhere():
        found = {step.stage: cost for step, cost in costs([planned.plan], on, 1e14)}
    assert all(cost.seconds is not None for stage, cost in found.items() if stage != FETCH)
    assert found[TRAIN].tokens and found[TRAIN].memory and found[GENERATE].tokens
    assert "disk: about " in planned.printed
    gone = [line for line in planned.printed.splitlines() if line.startswith("not on this machine")]
    assert any("HF_HUB_OFFLINE" in line for line in gone) == (name != "smollm2-lora")
    assert any("machine.device is cuda" in line for line in gone) == (machine["device"] == "cuda" and not CUDA)


def test_what_is_not_here_is_refused_where_something_would_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    olmo = Recipe.load(RECIPES / "olmo-1b-metamath.yaml")
    with pytest.raises(NotHere, match="HF_HUB_OFFLINE"), checked([olmo], Machine(device="cpu"), pipeline):
        pass
    free = shutil.disk_usage(ROOT)._replace(free=2**20)
    monkeypatch.setattr("flows._plan.shutil.disk_usage", lambda _: free)
    tiny = Recipe.load(RECIPES / "tiny.yaml", [f"target.path={RECIPES / 'tiny_target.jsonl'}"])
    with pytest.raises(NotHere, match=r"1\.0 MiB free"), checked([tiny], Machine(device="cpu"), pipeline):
        pass


def test_every_model_that_is_left_to_train_needs_its_place_on_the_disk(
    home: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Path, tmp_path: Path
) -> None:
    """Of 25 trainings each fitted the disk alone, and the command ran until it was full."""
    rows = write_rows(tmp_path / "rows.jsonl", count=24)
    sets = [
        f"base={model_folder}",
        f"target.path={rows}",
        "target.held_out=8",
        "generate.rows=0",
        "evaluate.benchmarks=[]",
    ]
    variants = {f"rate {number}": {"train.learning_rate": 1e-4 * (1 + number)} for number in range(25)}
    variants |= {f"merged {number}": {"merge.alpha": 0.1 * (1 + number)} for number in range(4)}  # of one training
    recipe = Recipe.load(RECIPES / "tiny.yaml", sets)
    recipes = Comparison(recipe=recipe, variants=variants).recipes()
    alone = disk_bytes(recipe, count_parameters(model_folder))
    model = KEPT_BYTES * count_parameters(model_folder)
    needed, machine = alone + (25 - 1 + 4) * model, Machine(device="cpu")  # the largest is in `alone`
    walked = walk(recipe, machine, pipeline)
    trained = walked._replace(steps=[step._replace(cached=step.stage == "train") for step in walked.steps])
    assert 0 < _disk_bytes([trained]) < alone - 12 * count_parameters(model_folder)  # no checkpoint any more
    for free, fits in ((needed + 2 * model, True), (needed - 2 * model, False)):
        usage = shutil.disk_usage(ROOT)._replace(free=int(free))
        monkeypatch.setattr("flows._plan.shutil.disk_usage", lambda _, usage=usage: usage)
        expected = nullcontext() if fits else pytest.raises(NotHere, match="train fewer variants")
        with expected, checked(recipes.values(), machine, pipeline):
            pass


def test_chats_are_planned_unless_the_base_is_known_to_have_none(
    plan_of: Callable[..., Planned], model_folder: Path
) -> None:
    unknown = "probe.modes is auto: chats are planned, and left out if the base turns out to have no chat template"
    asked = plan_of("olmo-1b-metamath", "probe.modes=[auto]", device="cpu")
    assert {"chat", "evaluate-chat"} < set(asked.stages) and unknown in asked.printed
    assert "the most that it can be" in asked.printed
    for changes, chats in (
        (["base=smollm2"], True), ([f"base={model_folder}"], False), (["base=tiny"], False),
        (["base=smollm2", "probe.modes=[unprompted]"], False),
    ):  # fmt: skip
        known = plan_of("tiny", *changes, device="cpu")
        assert ("chat" in known.stages) == chats and unknown not in known.printed


def test_shapes_known_by_name_have_the_weights_that_are_published() -> None:
    """8.03 and 8.19 billion, as the models' pages say; of OLMo 1.18, its config's arithmetic (its norms have none)."""
    weights = {name.rpartition("/")[2]: shapes.parameters() for name, shapes in KNOWN_SHAPES.items() if "/" in name}
    assert weights["DeepSeek-R1-Distill-Llama-8B"] == 8_030_261_248
    assert round(weights["Qwen3-8B"] / 1e9, 2) == 8.19 and round(weights["OLMo-1B-hf"] / 1e9, 2) == 1.18


def test_models_are_measured_in_half_the_bytes_on_a_gpu_and_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cfsd.estimate.room_for_two", lambda size, device: True)  # in this machine's memory
    recipe = Recipe.load(RECIPES / "olmo-1b-metamath.yaml")
    unknown = Artifact(kind="model", key="", content="")
    weights = KNOWN_SHAPES["allenai/OLMo-1B-hf"].parameters()
    with elsewhere():
        jobs = [job_of(recipe, unknown, unknown, Machine(device=device)) for device in ("cpu", "cuda")]
        for stage, less in ((EVALUATE_PROBE, 2 * 4 - 2), (EVALUATE_TARGET, 4 - 2), (FISHER, 0)):
            here, there = (estimate(stage, (), job, 1e11).memory for job in jobs)
            assert here and there and here - there == less * weights
