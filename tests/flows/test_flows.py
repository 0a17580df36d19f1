"""What runs again after which change: counted on real flow runs with a real Prefect server."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cfsd.machine import Machine
from cfsd.recipe import Recipe
from cfsd.report.run_record import RunRecord
from cfsd.store.artifact import Store

MEASURED_AFTER = ["evaluate", "evaluate-target", "show", "evaluate-target-divergence", "evaluate-probe"]
CPU = Machine(device="cpu", threads=1)


@pytest.fixture
def recipe(recipe_file: Path, benchmark_folder: Path) -> Recipe:
    return Recipe.load(recipe_file, [f"evaluate.benchmarks=[{{name: letters, folder: {benchmark_folder}}}]"])


@pytest.fixture(scope="session")
def benchmark_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two benchmarks of a user's own."""
    folder = tmp_path_factory.mktemp("benchmarks")
    for name, pairs in {"letters": ["ab", "cd", "ef", "gh"], "pairs": ["ac", "bd", "eg", "fh"]}.items():
        docs = [{"question": f"{p[0]} is not ", "choices": [p[0], p[1]], "answer": 1} for p in pairs]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}\n"
            "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\n"
            "doc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\nmetric_list: [{metric: acc}]\n"
        )
    return folder


def flow(recipe: Recipe, machine: Machine = CPU) -> RunRecord:
    from flows.mitigate import mitigate

    return mitigate(recipe, machine).only()


def executed(run_record: RunRecord) -> list[str]:
    return [step.stage for step in run_record.steps if step.executed]


def changed(recipe: Recipe, **changes: Any) -> Recipe:
    from cfsd.overrides import override, validated

    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    return validated(Recipe, override(recipe.model_dump(mode="json"), dotted), "test")


def test_only_what_depends_on_a_change_runs_again(
    recipe: Recipe, home: Path, server: str, benchmark_folder: Path
) -> None:
    first = executed(flow(recipe))
    assert first == ["fetch", "target", "generate", "filter", "probe", "mix", "check",
                     "evaluate", "evaluate-target", "show", "train", *MEASURED_AFTER]  # fmt: skip
    assert executed(flow(recipe)) == []
    assert executed(flow(changed(recipe, name="renamed"), CPU.model_copy(update={"sampling_rows": 7}))) == []
    assert executed(flow(changed(recipe, train__learning_rate=3e-4))) == ["train", *MEASURED_AFTER]
    assert executed(flow(changed(recipe, merge__alpha=0.5))) == ["merge", *MEASURED_AFTER]
    assert executed(flow(changed(recipe, probe__length=23))) == ["probe", "check", "evaluate-probe"]
    trained = ["mix", "check", "train", *MEASURED_AFTER]
    assert executed(flow(changed(recipe, filter__min_tokens=20))) == ["filter", *trained]
    assert executed(flow(changed(recipe, select__corpus_rows=20))) == ["embed", "select", *trained]
    both = [{"name": name, "folder": str(benchmark_folder)} for name in ("letters", "pairs")]
    assert executed(flow(changed(recipe, evaluate__benchmarks=both))) == ["evaluate", "evaluate"]


def test_a_moved_data_folder_runs_nothing_again(
    recipe: Recipe, home: Path, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = flow(recipe)
    shutil.move(home, tmp_path / "elsewhere")
    monkeypatch.setenv("CFSD_HOME", str(tmp_path / "elsewhere"))
    after = flow(recipe)
    assert executed(after) == []
    assert after.artifacts["final"] == before.artifacts["final"]


def test_what_prefect_remembers_but_the_store_lost_is_made_again(recipe: Recipe, home: Path, server: str) -> None:
    before = flow(recipe)
    shutil.rmtree(Store(home).path(before.artifacts["corpus"]))
    shutil.rmtree(Store(home).path(before.artifacts["tuned"]))
    after = flow(recipe)
    assert executed(after) == ["generate", "train"]
    assert after.artifacts["final"].content == before.artifacts["final"].content


def test_a_learning_rate_of_zero_changes_nothing(recipe: Recipe, home: Path, server: str) -> None:
    run_record = flow(changed(recipe, train__learning_rate=0.0))
    from cfsd.report.summarise import summarise

    summary = summarise(Store(home), run_record)
    assert executed(run_record).count("evaluate") == 2  # measured anew, not one artifact compared with itself
    for figure in (summary.target_gain, summary.probe_kl, summary.probe_kl_sampled, summary.mean_forgetting):
        assert figure and figure["value"] == 0.0
    assert run_record.before.benchmarks["letters"].key != run_record.after.benchmarks["letters"].key


def test_plan_tells_what_runs_without_running(recipe: Recipe, home: Path) -> None:
    from flows._plan import walk
    from flows.mitigate import pipeline

    steps = walk(recipe, CPU, pipeline).steps
    assert steps[0].stage == "fetch" and steps[0].key and not steps[0].cached
    assert steps[1].key is None  # depends on fetch
    assert not (home / "store").exists()


def test_what_a_command_checked_its_flows_do_not_check_again(recipe: Recipe, home: Path) -> None:
    from flows._plan import checked
    from flows.mitigate import pipeline

    walked: list[str] = []

    def counting(recipe: Recipe, machine: Machine) -> RunRecord:
        walked.append(recipe.name)
        return pipeline(recipe, machine)

    with checked([recipe], CPU, counting) as plans, checked([recipe], CPU, counting) as again:
        assert [plan.recipe for plan in plans] == [recipe] and again == []
    with checked([recipe], CPU, counting):
        assert walked == ["mine", "mine"]
