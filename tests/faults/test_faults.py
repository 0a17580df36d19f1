"""Every fault for real; then the same command again completes, loses nothing and makes nothing twice.

A case copies the data folder of a run that nobody disturbed, without what the stage at hand made, so that a fault costs
that stage and not a whole run. What is left to other files is named in the table of tests/faults/table.py.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from mlflow import MlflowClient

from tests.conftest import save_model, write_rows
from tests.faults.runs import Case, Ended

pytestmark = pytest.mark.processes

RECIPE = """name: mine
base: {model}
target: {{path: {rows}, held_out: 8}}
probe: {{rows: 16, length: 16}}
generate: {{rows: 16, length: 16}}
mix: {{target_rows: 8, rehearsal_tokens: 64}}
train: {{learning_rate: 1.0e-3, epochs: 1}}
merge: {{alpha: 0.5}}
"""
STAGES = ("fetch", "target", "generate", "filter", "probe", "mix", "check", "train", "merge", "evaluate-probe")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, server: str) -> Case:
    """A finished run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    rows, model = write_rows(folder / "rows.jsonl"), save_model(folder / "model")
    (folder / "recipe.yaml").write_text(RECIPE.format(model=model, rows=rows))
    case = Case(folder, folder / "recipe.yaml", {"MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}"})
    ended = case.run()
    assert ended.code == 0, ended.out
    return case


def assert_nothing_is_lost(case: Case, undisturbed: Case) -> Ended:
    """Run the command again and compare the store with that of the run that nobody disturbed."""
    before = case.state()
    ended = case.run()
    assert ended.code == 0, ended.out
    after = case.state()
    assert {name: after[name] for name in before} == before, "something that was finished was made again"
    assert contents(case) == contents(undisturbed)
    assert not list(case.home.glob("store/*/*.draft"))
    assert not running(case)
    for lock in (case.home / "store" / ".locks").iterdir():
        FileLock(lock).acquire(timeout=0).lock.release()
    return ended


def contents(case: Case) -> dict[str, str]:
    return {name: content for name, (_, content) in case.state().items()}


def running(case: Case) -> list[str]:
    client = MlflowClient(case.environment["MLFLOW_TRACKING_URI"])
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return [run.info.run_name for run in client.search_runs(experiments, "attributes.status = 'RUNNING'")]


# what ends a run


@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=() if stage == "mix" else pytest.mark.slow) for stage in STAGES]
)
def test_a_process_group_killed_in_a_stage_costs_that_stage(stage: str, undisturbed: Case, tmp_path: Path) -> None:
    case = undisturbed.copy(tmp_path, stage)
    with case.paused_in(stage) as run:
        run.kill()
    assert list(case.home.glob("store/*/*.draft")) == [undisturbed.place(stage, case.home).with_suffix(".draft")]
    assert_nothing_is_lost(case, undisturbed)


def test_two_identical_runs_at_once_make_everything_once(undisturbed: Case, tmp_path: Path) -> None:
    case = undisturbed.copy(tmp_path, "generate", "mix", "evaluate-probe")
    with case.paused_in("generate") as first:
        second = case.start()
        while "waiting for another process that makes corpus" not in second.log.read_text():
            assert second.process.is_alive(), second.log.read_text()
    ended = [run.wait() for run in (first, second)]
    assert [one.code for one in ended] == [0, 0], ended
    for stage in ("generate", "mix", "evaluate-probe"):
        key = undisturbed.place(stage).name
        made = [one.out.count(f"\n{stage} {key}\n") for one in ended]
        assert sum(made) == 1, (stage, made)
    assert_nothing_is_lost(case, undisturbed)


# what happens to finished work


def truncated(folder: Path) -> None:
    file = next(folder.glob("*.parquet"))
    os.truncate(file, file.stat().st_size // 2)


def one_byte(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "truncated": ("probe", truncated),
    "one byte changed": ("merge", one_byte),
    "deleted": ("filter", shutil.rmtree),
}


def test_damaged_artifacts_are_made_again_and_no_others(undisturbed: Case, tmp_path: Path) -> None:
    case = undisturbed.copy(tmp_path)
    places = {undisturbed.place(stage, case.home): damage for stage, damage in DAMAGE.values()}
    for place, damage in places.items():
        damage(place)
    before = case.state()
    ended = case.run()
    assert ended.code == 0, ended.out
    after = case.state()
    damaged = {str(place.relative_to(case.home)) for place in places}
    assert {name for name in after if before.get(name) != after[name]} == damaged
    assert contents(case) == contents(undisturbed)
    for place in places:
        said = f"{place.parent.name} {place.name} is damaged"
        assert (said in ended.out) == (places[place] is not shutil.rmtree), ended.out
    assert_nothing_is_lost(case, undisturbed)
