"""The gate as people meet it: flow states, exit codes, the verdict's words, and the nightly deployment."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cfsd.baseline.file import Baseline, baseline_of, read_baseline, write_baseline
from cfsd.baseline.measured import measured
from cfsd.errors import BadInput
from cfsd.machine import Machine
from cfsd.recipe import Recipe
from cfsd.store.artifact import Store
from flows._menu import menu
from tests.conftest import ROOT, Run
from tests.served import ask

CPU = Machine(device="cpu", threads=1)
FRESH = 5  # the seed after those of the baselines below


def baseline_like(recipe: Recipe, home: Path, scale: dict[str, float]) -> Baseline:
    """Return a baseline whose seeds all but equal one real run, some figures `scale` times what it came to."""
    from flows._gate_runs import reseeded
    from flows.mitigate import mitigate

    run = measured(Store(home), mitigate(reseeded(recipe, FRESH), CPU).only())
    seeds = [
        {name: f._replace(sums=f.sums * scale.get(name, 1.0) * (1 + 0.01 * k)) for name, f in run.items()}
        for k in range(-2, 3)
    ]
    return baseline_of(recipe, range(FRESH), seeds, [1.0] * FRESH, replaces="")


@pytest.mark.slow
def test_the_three_verdicts(recipe_file: Path, home: Path, server: str, run: Run, tmp_path: Path) -> None:
    from cfsd.report.summarise import summarise
    from flows._gate_runs import reseeded
    from flows.mitigate import mitigate
    from flows.regress import GotWorse, regress

    recipe, file = Recipe.load(recipe_file), tmp_path / "baseline.json"

    def judged() -> Any:
        return regress(recipe, str(file), 1, False, CPU, return_state=True)

    known = baseline_like(recipe, home, {})
    summary = summarise(Store(home), mitigate(reseeded(recipe, FRESH), CPU).only())
    for name, figure in known.figures.items():
        assert figure.values[2] == pytest.approx(getattr(summary, name)["value"], rel=1e-4)
    write_baseline(file, known)
    state = judged()
    assert state.is_completed() and state.name == "Completed" and state.message.startswith("PASS"), state.message

    sharp = known.figures["probe_kl"].model_copy(update={"margin": 1 + 1e-9})
    write_baseline(file, known.model_copy(update={"figures": known.figures | {"probe_kl": sharp}}))
    state = judged()
    assert state.is_completed() and state.name == "Cannot tell" and "probe_kl" in state.message
    done = run("regress", recipe_file, "--baseline", file, "--seeds", 1, "--machine", "threads=1")
    assert done.returncode == 3, done.stdout + done.stderr

    write_baseline(file, baseline_like(recipe, home, {"probe_kl": 0.01}))
    state = judged()
    assert state.is_failed() and state.message.startswith("FAIL: got worse since the baseline of"), state.message
    assert "probe_kl by" in state.message and "target_gain" not in state.message
    with pytest.raises(GotWorse, match="probe_kl"):
        state.result()
    verdict = sorted((home / "reports").glob("*/verdict.md"))[-1]
    assert known.provenance.recipe_digest in verdict.read_text()
    assert json.loads(verdict.with_suffix(".json").read_text())["findings"][0]["name"] == "probe_kl"


def test_without_a_baseline_nothing_runs(run: Run, recipe_file: Path, home: Path) -> None:
    done = run("regress", recipe_file, "--baseline", "none.json")
    assert done.returncode == 2 and "--update-baseline" in done.stderr
    assert not (home / "store").exists()


def test_what_changed_in_the_recipe_is_named_and_seeds_are_not(recipe_file: Path) -> None:
    from cfsd.baseline.file import Provenance
    from flows._gate_runs import reseeded
    from flows._verdict import _abridged, changes

    recipe = Recipe.load(recipe_file)
    other = Recipe.load(recipe_file, ["train.rehearsal.weight=0"])
    source = Provenance(commit="c", date="d", recipe_digest=recipe.digest(), versions={}, machine="m")
    known = Baseline.model_construct(provenance=source, recipe=recipe.model_dump(mode="json"))
    assert changes(known, reseeded(recipe, 7)) == []
    assert changes(known, other) == ["train.rehearsal.weight: 1.0 -> 0.0"]
    older = known.model_copy(update={"recipe": {k: v for k, v in known.recipe.items() if k != "merge"}})
    assert changes(older, recipe) == []  # a field that came later has its default
    strange = known.model_copy(update={"recipe": known.recipe | {"gone": 1}})
    assert changes(strange, recipe) == ["gone: 1 -> absent"]
    long = "answer in a box at the very end of it all, please. {prompt}"
    before, after = ({"target": {"prompt": text}} for text in (long, f"{long}\nAnswer:"))
    assert _abridged(before["target"]["prompt"], after["target"]["prompt"]).endswith(" {prompt}\\nAnswer:")
    more = recipe.model_dump(mode="json")
    more["evaluate"]["benchmarks"] = [*more["evaluate"]["benchmarks"], {"name": "facts"}]
    (change,) = changes(known.model_copy(update={"recipe": more}), recipe)
    assert '"facts"' in change.split(" -> ")[0] and '"facts"' not in change.split(" -> ")[1]


def test_what_the_recipe_does_not_measure_is_told_before_anything_runs(run: Run, home: Path, tmp_path: Path) -> None:
    recipe = (ROOT / "deployments" / "recipes" / "tiny.yaml").read_text()
    (tmp_path / "less.yaml").write_text(recipe.replace("tiny_rev, ", ""))
    baseline = ROOT / "deployments" / "baselines" / "tiny.json"
    done = run("regress", tmp_path / "less.yaml", "--baseline", baseline)
    assert done.returncode == 2 and "guards forgetting/tiny_rev, which this recipe does not measure" in done.stderr
    assert not (home / "store").exists()


def test_a_baseline_that_cannot_be_read_can_be_replaced_and_another_recipes_cannot(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import _known_baseline

    recipe, shipped = Recipe.load(recipe_file), ROOT / "deployments" / "baselines" / "tiny.json"
    broken = tmp_path / "b.json"
    broken.write_text(shipped.read_text().replace('"margin_is": "factor"', '"margin_is": "quotient"'))
    assert _known_baseline.known_baseline(recipe, str(broken), needed=False) is None
    (notes := tmp_path / "notes.txt").write_text("a thesis")
    with pytest.raises(BadInput, match=r"notes\.txt is there and is no baseline"):  # from the form as well
        _known_baseline.known_baseline(recipe, str(notes), needed=False)
    with pytest.raises(BadInput, match=r"figures\.probe_kl\.margin_is: .*\ncorrect it, or make it anew"):
        _known_baseline.known_baseline(recipe, str(broken))

    monkeypatch.setattr(_known_baseline, "BASELINES", tmp_path)
    for name in ("Тест", "Экзамен"):  # slugs of these kept no letter
        renamed = recipe.model_copy(update={"name": name})
        shutil.copy(shipped, _known_baseline.baseline_file(renamed, None))
        for needed in (True, False):
            with pytest.raises(BadInput, match=f"is the baseline of 'tiny', not of '{name}'"):
                _known_baseline.known_baseline(renamed, None, needed=needed)
    assert len(list(tmp_path.glob("recipe-*.json"))) == 2


def test_seeds_vary_all_but_what_is_measured_on(recipe_file: Path) -> None:
    from flows._gate_runs import reseeded

    one, two = (reseeded(Recipe.load(recipe_file), number) for number in (1, 2))
    assert one.target == two.target and one.probe == two.probe
    assert all(getattr(one, part).digest() != getattr(two, part).digest() for part in ("generate", "mix", "train"))


def test_the_nightly_deployment_guards_the_shipped_recipe() -> None:
    deployments = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())["deployments"]
    nightly = next(deployment for deployment in deployments if deployment["name"] == "regress")
    shipped = Recipe.load(ROOT / "deployments" / "recipes" / "tiny.yaml")
    assert Recipe.load(menu("recipe")[nightly["parameters"]["recipe"]]) == shipped
    assert [schedule["cron"] for schedule in nightly["schedules"]] == ["17 3 * * *"]


def test_a_refresh_of_the_menus_leaves_schedules_as_people_made_them() -> None:
    from flows._deployed import without_schedules

    config = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())
    assert without_schedules(config, []) == config
    refreshed = without_schedules(config, ["regress", "mitigate"])
    (gate,) = (deployment for deployment in refreshed["deployments"] if deployment["name"] == "regress")
    assert "schedules" not in gate and gate["parameters"] == {"recipe": "tiny"}


@pytest.mark.slow
def test_the_deployment_on_a_real_server(recipe_file: Path, home: Path, server: str, tmp_path: Path) -> None:
    from flows._deployed import deploy

    recipe, api = Recipe.load(recipe_file), f"{server}/api"
    files = {name: tmp_path / f"{name}.json" for name in ("COMPLETED", "FAILED")}
    for file, scale in zip(files.values(), ({}, {"probe_kl": 0.01}), strict=True):
        write_baseline(file, baseline_like(recipe, home, scale))
    (home / "recipes").mkdir(parents=True, exist_ok=True)
    (home / "recipes" / "mine.yaml").write_text(recipe_file.read_text())
    environment = {**os.environ, "CFSD_HOME": str(home), "CFSD_ROOT": str(ROOT), "CFSD_POOL": "cpu",
                   "PYTHONPATH": str(ROOT)}  # fmt: skip

    def prefect(*words: str) -> None:
        command = [sys.executable, "-m", "prefect", *words]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr

    prefect("work-pool", "create", "cpu", "--type", "process", "--overwrite")
    prefect("--no-prompt", "deploy", "--name", "regress", "--prefect-file", "deployments/prefect.yaml")
    deployment = ask(f"{api}/deployments/name/regress/regress")
    own = [{"schedule": {"cron": "0 2 * * *"}, "active": True, "parameters": {"recipe": "mine"}}]
    ask(f"{api}/deployments/{deployment['id']}/schedules", own)
    deploy(environment | {"PREFECT_API_URL": api})  # as another `make up`
    deployment = ask(f"{api}/deployments/name/regress/regress")
    assert {s["schedule"]["cron"]: s["parameters"] for s in deployment["schedules"]} == {
        "17 3 * * *": {}, "0 2 * * *": {"recipe": "mine"},
    }  # fmt: skip
    assert all(schedule["active"] for schedule in deployment["schedules"])
    for expected, file in files.items():
        parameters = {"recipe": "mine", "baseline": str(file), "seeds": 1, "machine": {"device": "cpu", "threads": 1}}
        started = ask(f"{api}/deployments/{deployment['id']}/create_flow_run", {"parameters": parameters})
        prefect("worker", "start", "--pool", "cpu", "--type", "process", "--run-once")
        state = ask(f"{api}/flow_runs/{started['id']}")["state"]
        assert state["type"] == expected, state
        assert state["message"].startswith("FAIL: got worse" if expected == "FAILED" else "PASS")


@pytest.mark.slow
def test_a_baseline_of_five_seeds_passes_its_own_recipe_and_fails_a_fault(
    run: Run, recipe_file: Path, tmp_path: Path
) -> None:
    words = [recipe_file, "--baseline", tmp_path / "own.json", "--machine", "threads=1"]
    assert run("regress", *words, "--update-baseline").returncode == 0
    assert len(read_baseline(tmp_path / "own.json").seeds) == 5
    assert run("regress", *words).returncode in (0, 3)
    planted = run("regress", *words, "--set", "train.learning_rate=0.03")
    assert planted.returncode == 1 and "train.learning_rate: 0.001 -> 0.03" in planted.stdout


@pytest.mark.slow
def test_the_champion_moves_on_pass_alone_shown_with_a_learning_rate_of_zero(
    recipe_file: Path, home: Path, server: str
) -> None:
    from mlflow import MlflowClient
    from safetensors.numpy import load_file

    from flows._gate_runs import reseeded
    from flows._known_baseline import CHAMPION, known_baseline
    from flows.mitigate import mitigate
    from flows.regress import regress

    name = f"still {home.parent.name}"  # one registry for all tests of a session
    still = Recipe.load(recipe_file, ["train.learning_rate=0", f"name={name}"])

    def judged(recipe: Recipe, seeds: int | None = None, *, update: bool = False) -> tuple[Any, int]:
        state = regress(recipe, CHAMPION, seeds, update, CPU, return_state=True)
        return state, int(MlflowClient().get_model_version_by_alias(name, "champion").version)

    with pytest.raises(BadInput, match="--baseline champion --update-baseline"):
        regress(still, CHAMPION, None, False, CPU)
    state, version = judged(still, update=True)
    known = known_baseline(still, CHAMPION)
    assert version == 1 and known and known.seeds == (0, 1, 2, 3, 4)
    assert known.figures["target_gain"].values == (0.0,) * 5
    assert max(known.figures["probe_kl"].values) <= 1e-7
    run_record = mitigate(reseeded(still, 0), CPU).only()
    base, final = (
        load_file(Store(home).path(run_record.artifacts[role]) / "model.safetensors") for role in ("base", "final")
    )
    assert all((base[tensor] == final[tensor]).all() for tensor in base) and base.keys() == final.keys()

    state, version = judged(still, seeds=1)
    assert state.message.startswith("PASS") and version == 1, "one seed is no baseline"
    state, version = judged(still)
    assert state.message.startswith("PASS") and version == 2, state.message
    verdicts = sorted((home / "reports").glob("*/verdict.md"), key=lambda file: file.stat().st_mtime_ns)
    assert "trainings were found in the store" in verdicts[-1].read_text(), "seed 5 had been trained before"
    successor = known_baseline(still, CHAMPION)
    assert successor and successor.seeds == (5, 6, 7, 8, 9) and successor.provenance.replaces
    faulty = Recipe.load(recipe_file, ["train.learning_rate=0.03", f"name={name}"])
    state, version = judged(faulty, seeds=1)
    assert state.is_failed(), state.message
    assert version == 2 and known_baseline(still, CHAMPION) == successor
