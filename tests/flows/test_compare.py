"""Several ways of training, and two models that exist: what runs once, what is written, what is last on the screen."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from cfsd.errors import BadInput
from tests.conftest import ROOT, Run, save_model, write_rows
from tests.model.test_adapter import trained
from tests.tasks.test_record import elsewhere, runs

ON = ["--machine", "threads=1"]


@pytest.fixture
def comparison_file(recipe_file: Path) -> Path:
    recipe = yaml.safe_load(recipe_file.read_text())
    variants = {"finetune": {"generate.rows": 0}, "rehearse": {}, "strong": {"train.rehearsal.weight": 3.0}}
    file = recipe_file.with_name("comparison.yaml")
    file.write_text(yaml.safe_dump({"recipe": recipe, "variants": variants}))
    return file


def summary_of(done: Any) -> dict[str, Any]:
    path = Path(done.stdout.strip().splitlines()[-1])
    assert path.name == "summary.json"
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def test_what_repeats_vary_needs_repeats(comparison_file: Path) -> None:
    from flows.compare import compare_command

    with pytest.raises(
        BadInput, match=r"corpus\) is about repeats, and every variant runs once: give seeds, too, such as 3"
    ):
        compare_command(comparison_file, seeds_vary="corpus")


def test_variants_share_what_they_can(run: Run, comparison_file: Path, tmp_path: Path) -> None:
    seen = {"env": elsewhere(tmp_path / "seen.db")}
    done = run("compare", comparison_file, *ON, **seen)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = summary_of(done)
    assert summary["schema"] == 2 and list(summary["variants"]) == ["finetune", "rehearse", "strong"]
    stages = {n: [label.split()[0] for label in v["executed"]] for n, v in summary["variants"].items()}
    measured = ["evaluate-target", "show", "evaluate-target-divergence", "evaluate-probe"]
    first = ["fetch", "target", "generate", "filter", "probe", "mix", "evaluate-target", "show", "train"]
    assert stages["finetune"] == first + measured
    assert stages["rehearse"] == ["generate", "filter", "mix", "check", "train", *measured]
    assert stages["strong"] == ["train", *measured]
    for variant in summary["variants"].values():
        for figure in ("target_gain", "target_accuracy_gain", "probe_kl"):
            assert variant[figure]["low"] <= variant[figure]["value"] <= variant[figure]["high"]
    assert summary["variants"]["finetune"]["seconds"].keys() == set(first + measured)
    report = Path(done.stdout.strip().splitlines()[-1]).with_name("report.html").read_text()
    assert "rehearse" in report and "strong" in report
    for found in summary["comparisons"]:
        values = [summary["variants"][found[side]][found["measure"]]["value"] for side in ("one", "other")]
        assert found["value"] == pytest.approx(values[0] - values[1], abs=1e-12) and found["paired"]
    measures = ["target_gain", "target_accuracy_gain", "probe_kl", "reverse_kl", "target_divergence"]
    assert [c["measure"] for c in summary["comparisons"] if c["other"] == "strong"] == sorted(
        measures * 2, key=measures.index
    )
    again = summary_of(second := run("compare", comparison_file, *ON, **seen))
    assert all(variant["executed"] == [] for variant in again["variants"].values())
    assert again["comparisons"] == summary["comparisons"]
    verdicts = [[line for line in flow.stdout.splitlines() if "Of 3 variants" in line] for flow in (done, second)]
    assert verdicts[0] == verdicts[1] and len(verdicts[0]) == 1
    above = [r.data.metrics for r in runs(tmp_path / "seen.db") if r.data.tags["cfsd.kind"] == "comparison"]
    name, first = "comparison/finetune - rehearse/probe_kl", summary["comparisons"]
    kl = next(c for c in first if (c["one"], c["other"], c["measure"]) == ("finetune", "rehearse", "probe_kl"))
    assert all(metrics[name] == kl["value"] and metrics[f"{name}_low"] == kl["low"] for metrics in above) and above
    figures = ("target_gain", "probe_kl")
    assert all(again["variants"][n][f] == v[f] for n, v in summary["variants"].items() for f in figures)


@pytest.mark.slow
def test_seeds_repeat_training_on_one_corpus(run: Run, comparison_file: Path, home: Path) -> None:
    done = run("compare", comparison_file, "--seeds", 2, *ON)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = summary_of(done)
    assert list(summary["variants"])[:2] == ["finetune seed=0", "finetune seed=1"]
    assert [label.split()[0] for label in summary["variants"]["rehearse seed=1"]["executed"]] == [
        "mix", "check", "train", "evaluate-target", "show", "evaluate-target-divergence", "evaluate-probe",
    ]  # fmt: skip
    two = [summary["variants"][f"rehearse seed={seed}"]["probe_kl"]["value"] for seed in (0, 1)]
    assert two[0] != two[1]
    report = Path(done.stdout.strip().splitlines()[-1]).with_name("report.html")
    assert report.is_relative_to(home) and "2 seeds per variant" in report.read_text()


def test_two_models_that_exist(run: Run, model_folder: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", seed=1)
    rows = write_rows(tmp_path / "rows.jsonl")
    prompts = tmp_path / "support.jsonl"
    prompts.write_text("".join(f'{{"prompt": "say {letter}"}}\n' for letter in "abcdefgh"))
    words = ["--target", rows, "--set", "probe.rows=16", "--set", "probe.length=16", "--set", "target.held_out=8"]
    words += ["--prompts", prompts, "--prompts", f"same={prompts}", "--set", f"evaluate.show={prompts}"]
    done = run("measure", model_folder, other, *words, *ON)
    assert done.returncode == 0, done.stdout + done.stderr
    found = summary_of(done)["variants"]["other"]
    assert found["probe_kl"]["low"] > 0 and found["target_gain"]["unit"] == "nats/token"
    assert found["prompts"]["support"]["kl"]["low"] > 0 and found["prompts"]["support"] == found["prompts"]["same"]
    assert {"prompts", "evaluate-prompts", "show"} <= found["seconds"].keys()
    page = Path(done.stdout.strip().splitlines()[-1]).with_name("report.html").read_text()
    assert found["shown"]["rows"] == 8 + 2 + 2 > found["shown"]["as_base"]
    assert page.index('<h2 id="words">') < page.index("say h</div>") < page.index('<h2 id="table">')
    (same,) = summary_of(run("measure", model_folder, model_folder, *words, *ON))["variants"].values()
    assert same["probe_kl"]["value"] == 0.0 and same["shown"]["as_base"] == 12


def test_an_adapter_is_measured_merged_into_its_base(run: Run, model_folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    adapter = trained(model_folder, tmp_path / "mine", LoraConfig(r=2, target_modules=["o_proj"]))
    words = ["--set", "probe.rows=16", "--set", "probe.length=16"]
    done = run("measure", model_folder, adapter, *words, *ON)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = summary_of(done)["variants"][f"adapter mine merged into {model_folder.name}"]
    assert figures["probe_kl"]["low"] > 0 and "merge-adapter" in figures["seconds"]
    assert "trained on" not in done.stdout, "the adapter names this base"
    refused = run("measure", adapter, model_folder, *ON)
    assert refused.returncode == 2 and "merge it into its base first" in refused.stderr


def test_every_shipped_recipe_loads_and_has_what_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    from cfsd.comparison import Comparison
    from cfsd.errors import NotHere
    from cfsd.model.hub import is_commit
    from cfsd.overrides import read_yaml
    from cfsd.recipe import Recipe
    from cfsd.target_sequence import TargetSequence

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for path in sorted((ROOT / "deployments" / "recipes").glob("*.yaml")):
        content = read_yaml(path)
        several = TargetSequence if "targets" in content else Comparison
        recipes = [*several.load(path).recipes().values()] if "recipe" in content else [Recipe.load(path)]
        for recipe in recipes:
            for part in (recipe.base, recipe.target):
                assert part.kind != "hub" or is_commit(part.revision or ""), f"{path.name}: {part.name} can change"
            for check in recipe.checks():
                with suppress(NotHere):  # a model of the hub, bitsandbytes
                    check()
        assert len({recipe.digest() for recipe in recipes}) == len(recipes)


def test_every_field_says_what_it_does() -> None:
    from cfsd.machine import Machine
    from cfsd.recipe import Recipe
    from flows.fields import rows

    assert [field.name for field in rows(Recipe) + rows(Machine) if not field.description] == []
    assert "train.rehearsal.weight" in {field.name for field in rows(Recipe)}
