"""Targets in turn: each stage starts from the model before, and every model is scored on every target."""

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

from cfsd.errors import BadInput
from cfsd.machine import Machine
from cfsd.report.files import read_kept
from cfsd.report.sequence.files import read_measured
from cfsd.store.artifact import Store
from cfsd.store.tables import read_rows
from cfsd.target_sequence import TargetSequence
from flows._plan import costs
from flows.continual import planned_in_turn
from tests.conftest import Run

SECOND = {"target.prompt": "{response}=", "target.response": "{prompt}", "train.epochs": 1}


@pytest.fixture
def sequence_file(recipe_file: Path) -> Path:
    recipe = yaml.safe_load(recipe_file.read_text())
    content = {"recipe": recipe, "targets": {"first": {}, "second": SECOND}, "earlier": "prompts"}
    file = recipe_file.with_name("sequence.yaml")
    file.write_text(yaml.safe_dump(content))
    return file


def planned(sequence_file: Path) -> Counter[tuple[str, bool]]:
    machine = Machine(device="cpu", threads=1)
    plans = planned_in_turn(TargetSequence.load(sequence_file), machine)
    return Counter((step.stage, step.cached) for step, _ in costs(plans, machine, 1e9))


def test_every_stage_starts_from_the_model_before(sequence_file: Path, run: Run, home: Path) -> None:
    before = planned(sequence_file)
    assert before["generate", False] == before["fetch", False] == before["train", False] == 2
    # 3 models on 2 targets, the one between on the second target both as tuned and as the second stage's base
    assert before["evaluate-target", False] == 7 and before["evaluate-probe", False] == 3
    done = run("continual", sequence_file, "--machine", "threads=1")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = Path(done.stdout.strip().splitlines()[-1]).parent
    first, second = read_kept(folder).run_records
    assert second.artifacts["base"].content == first.artifacts["final"].content
    assert second.artifacts["corpus"].content != first.artifacts["corpus"].content  # text of the model before
    shares = second.artifacts["corpus"].metadata["token_fractions"]
    assert isinstance(shares, dict) and shares["earlier-prompts 1"] == pytest.approx(0.5, abs=0.03)
    found = json.loads((folder / "continual.json").read_text())["targets"]
    scores = found["matrix"]
    assert found["targets"] == ["first", "second"] and [len(row) for row in scores] == [2, 2, 2]
    losses = [
        [-float(str(s.target.metadata["loss"])) for s in (t.before, t.after) if s.target] for t in (first, second)
    ]
    assert [scores[0][0], scores[1][0]] == losses[0] and [scores[1][1], scores[2][1]] == losses[1]
    transfer = found["backward_transfer"]
    assert transfer["value"] == pytest.approx(scores[2][0] - scores[1][0], rel=1e-4, abs=1e-6)
    assert transfer["low"] <= transfer["value"] <= transfer["high"]
    assert "R[t, j]: held-out score of target j" in done.stdout
    way = "Of the rehearsal's tokens 50% are what the model before each stage answers to the prompts of"
    assert way in done.stdout and way.replace("'", "&#39;") in (folder / "report.html").read_text()
    report = (folder / "report.html").read_text()
    assert "Every model on every target: the R matrix" in report and "backward transfer" in report
    measured = read_measured(folder)
    assert measured and [len(row) for row in measured.scored] == [2, 2, 2]
    assert measured.probes[0] == first.after.probe  # the first stage's own base is the first base
    assert Store(home).path(second.artifacts["final"]).is_dir()
    after = planned(sequence_file)
    assert all(cached for _, cached in after) and after["generate", True] == after["fetch", True] == 2
    assert after["evaluate-target", True] == before["evaluate-target", False]


@pytest.mark.slow
def test_earlier_rows_are_rehearsed_by_divergence_in_every_repeat_and_the_page_says_so(
    sequence_file: Path, run: Run, home: Path
) -> None:
    content = yaml.safe_load(sequence_file.read_text())
    content["recipe"]["train"]["rehearsal"] = {"loss": "kl"}
    content["recipe"]["generate"]["top_logprobs"] = 4
    sequence_file.write_text(yaml.safe_dump(content))
    words = [sequence_file, "--earlier", "rows", "--earlier-fraction", "0.4", "--seeds", "2", "--machine", "threads=1"]
    done = run("continual", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = Path(done.stdout.strip().splitlines()[-1]).parent
    way = "Of the rehearsal's tokens 40% are responses of the earlier targets' own training rows"
    assert way in (folder / "report.html").read_text().replace("&#39;", "'") and way in done.stdout
    found = json.loads((folder / "continual.json").read_text())
    assert found["seeds"] == 2 and [len(row) for row in found["exact"]] == [2, 2, 2]
    store, models = Store(home), []
    for seed in (0, 1):
        first, second = read_kept(folder / f"mine-seed-{seed}").run_records
        shares = second.artifacts["corpus"].metadata["token_fractions"]
        assert isinstance(shares, dict) and shares["earlier-rows 1"] == pytest.approx(0.4, abs=0.03)
        train = {tuple(row["token_ids"]) for row in read_rows(store.path(first.artifacts["target"]), "train")}
        rows = read_rows(store.path(second.artifacts["mixture"]), "mixture")
        rehearsed = {tuple(row["token_ids"]) for row in rows if row["source"] == "earlier-rows 1"}
        assert rehearsed and rehearsed <= train
        models.append(second.artifacts["final"].content)
    assert models[0] != models[1]
    again = run("continual", *words)  # everything is there
    assert again.returncode == 0 and again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]


def test_a_wrong_stage_is_named_before_anything_runs(sequence_file: Path) -> None:
    content = yaml.safe_load(sequence_file.read_text())
    with pytest.raises(BadInput, match=r"target 'second' is not valid:\n  train\.epochs"):
        TargetSequence.model_validate(content | {"targets": {"first": {}, "second": {"train.epochs": 0}}}).recipes()
    with pytest.raises(ValueError, match="at least 2 items"):
        TargetSequence.model_validate(content | {"targets": {"first": {}}})
