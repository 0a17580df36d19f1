"""Mistakes that users make: each gives one clear message before anything expensive starts, and exit code 2."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Run, save_model, write_rows
from tests.model.folders import change_json

Case = tuple[Callable[[Path], list[str]], str]


def _set(*changes: str) -> Callable[[Path], list[str]]:
    return lambda folder: [word for change in changes for word in ("--set", change)]


def _empty(folder: Path) -> list[str]:
    (folder / "empty.jsonl").touch()
    return ["--set", f"target.path={folder / 'empty.jsonl'}"]


def _not_a_model(folder: Path) -> list[str]:
    (folder / "nothing").mkdir()
    return ["--set", f"base={folder / 'nothing'}"]


def _broken_rows(folder: Path) -> list[str]:
    (folder / "broken.jsonl").write_text('{"prompt": "a", "response": \n')
    return ["--set", f"target.path={folder / 'broken.jsonl'}"]


def _no_column(folder: Path) -> list[str]:
    return ["--set", "target.prompt=question"]


def _no_start_token(folder: Path) -> list[str]:
    model = save_model(folder / "model", bos=False)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (model / name).read_text()
        (model / name).write_text(text.replace('"eos_token": "<eos>",', "").replace('"pad_token": "<eos>",', ""))
    return ["--set", f"base={model}"]


CASES: dict[str, Case] = {
    "no target file": (_set("target.path=nowhere.jsonl"), "target 'nowhere.jsonl' does not exist"),
    "empty target": (_empty, "is empty"),
    "target of another kind": (_set("target.path=README.md"), "ends in '.md'; allowed: .jsonl"),
    "unknown field": (_set("train.learning_rat=1"), "train.learning_rat: Extra inputs are not permitted"),
    "negative weight": (_set("train.rehearsal.weight=-1"), "train.rehearsal.weight: Input should be greater"),
    "a word for a number": (_set("train.epochs=many"), "train.epochs: Input should be a valid integer"),
    "no such benchmark": (_set("evaluate.benchmarks=[no_such_thing]"), "no benchmark 'no_such_thing'"),
    "no benchmark folder": (_set("evaluate.benchmarks=[{name: a, folder: nowhere}]"), "no folder nowhere"),
    "two benchmarks of one name": (_set("evaluate.benchmarks=[facts, facts]"), "named twice: facts"),
    "base that does not exist": (_set("base=./nowhere"), "model 'nowhere' is not a folder"),
    "base that is not a model": (_not_a_model, "is not a model: config.json and *.safetensors are needed"),
    "no such generator": (_set("target={kind: gym, name: nonsense, rows: 9}"), "reasoning-gym cannot make 'nonsense'"),
    "rows that are not JSON": (_broken_rows, "could not be read as json"),
    "no such column": (_no_column, "target has no column for 'question'"),
    "every row too long": (_set("target.max_length=3"), "40 longer than max_length=3"),
    "too few rows": (_set("target.held_out=40"), "held_out=40 of them are kept"),
    "no start token": (_no_start_token, "set base.start_token"),
    "unknown start token": (_set("base.start_token=<nope>"), "'<nope>' is not a token"),
    "longer than the context": (_set("generate.length=500"), "set generate.length to at most 127"),
    "disk too small": (_set("generate.rows=1000000000000"), "GiB free"),
    "malformed override": (_set("train.epochs"), "is not of the form field.name=value"),
    "a layer that the base has not": (
        _set("train.methods.lora.rank=2", "train.methods.lora.targets=[q_prj]"),
        "lora.targets q_prj: this model has no such linear layer; allowed: down_proj",
    ),
    "more rows selected than sampled": (
        _set("select.corpus_rows=5000"),
        "select.corpus_rows is 5000, but generate.rows",
    ),
    "no chat template": (_set("target.messages=prompt"), "column 'prompt' is not a list of messages"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_clear_message(name: str, run: Run, recipe_file: Path, tmp_path: Path) -> None:
    words, message = CASES[name]
    done = run("mitigate", recipe_file, *words(tmp_path))
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not list((tmp_path / "data" / "store" / "corpus").glob("*/corpus-*")), "something was sampled first"


def test_a_filter_that_leaves_nothing_ends_before_training(run: Run, recipe_file: Path, tmp_path: Path) -> None:
    """It would be plain fine-tuning in silence. The corpus itself can be made, to see what was rejected."""
    strict = ("--set", "filter.min_tokens=1000")
    done = run("mitigate", recipe_file, *strict)
    assert done.returncode == 2 and "the filter left none of " in done.stderr, done.stdout + done.stderr
    assert "fewer than 1000 tokens); loosen `filter`, or set generate.rows to 0" in done.stderr
    assert not (tmp_path / "data" / "store" / "mixture").exists()
    assert run("mitigate", recipe_file, *strict, "--until", "filter").returncode == 0


def test_recipe_that_is_not_there(run: Run) -> None:
    done = run("mitigate", "nowhere.yaml")
    assert done.returncode == 2 and "recipe 'nowhere.yaml' does not exist" in done.stderr


def test_recipe_that_is_not_yaml(run: Run, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("a: [1")
    done = run("mitigate", tmp_path / "broken.yaml")
    assert done.returncode == 2 and "is not valid YAML" in done.stderr


def test_unknown_option(run: Run, recipe_file: Path) -> None:
    done = run("mitigate", recipe_file, "--epochs", "3")
    assert done.returncode == 2 and "No such option" in done.stderr


def test_models_of_different_vocabularies(run: Run, model_folder: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", bos=False)
    done = run("measure", model_folder, other)
    assert done.returncode == 2 and "different vocabularies" in done.stderr


def test_a_probe_longer_than_either_model_attends_to_is_refused(run: Run, model_folder: Path, tmp_path: Path) -> None:
    shorter = Path(shutil.copytree(model_folder, tmp_path / "shorter"))
    change_json(shorter / "config.json", max_position_embeddings=8)
    for pair in ((model_folder, shorter), (shorter, model_folder)):
        done = run("measure", *pair, "--set", "probe.length=8")
        assert done.returncode == 2 and "attends to 8 tokens; set probe.length to at most 7" in done.stderr


def test_rows_are_helpful_about_columns(run: Run, recipe_file: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "more.jsonl")
    done = run("mitigate", recipe_file, "--set", f"target.path={rows}", "--set", "target.response={answer}")
    assert done.returncode == 2 and "its columns are 'prompt', 'response'" in done.stderr


def test_a_folder_with_a_broken_benchmark_is_not_measured_without_it(
    run: Run, model_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "good.yaml").write_text("task: good\n")
    (tmp_path / "bad.yaml").write_text("task: bad\nmetric_list: [\n")
    done = run("measure", model_folder, model_folder, "--benchmarks", tmp_path)
    assert done.returncode == 2 and "bad.yaml, line" in done.stderr
