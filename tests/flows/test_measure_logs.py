"""Two models by their logs alone: the figures are those of measuring the models, and mistakes are refused early."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cfsd.errors import BadInput
from cfsd.evaluate.benchmark_files import BUNDLED
from cfsd.evaluate.logs.folder import logs_in
from flows._cli import NO_VERDICT
from flows._logs import _given_otherwise
from flows.measure import measure_command
from tests.conftest import ROOT, Run
from tests.evaluate.test_logs import LOGS, edit, edit_samples

ACCURACIES = ("facts", "tiny_rev", "tiny_cap")
LIMIT = 30
BY_HAND = """
import sys
from lm_eval.__main__ import cli_evaluate
for model, folder in zip(sys.argv[1:3], sys.argv[3:5]):
    sys.argv[1:] = [
        "--model", "hf", "--model_args", f"pretrained={model}", "--tasks", "TASKS", "--include_path", ".",
        "--output_path", folder, "--log_samples", "--limit", "LIMIT", "--device", "cpu", "--batch_size", "8",
    ]
    cli_evaluate()
"""


def save_models(folder: Path) -> tuple[Path, Path]:
    """Write tiny, and a copy that forgot a part of what it knew."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cfsd.model.tiny import shipped

    base, tuned = folder / "base", folder / "tuned"
    base.mkdir()
    shipped(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(tuned)
    AutoTokenizer.from_pretrained(base).save_pretrained(tuned)
    return base, tuned


def benchmarks_in(done: "subprocess.CompletedProcess[str]") -> dict[str, Any]:
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(Path(done.stdout.splitlines()[-1]).read_text())
    (variant,) = summary["variants"].values()
    return dict(variant["benchmarks"]) | {"mean": variant["mean_forgetting"]}


@pytest.mark.slow
def test_logs_and_models_give_the_same_figures(run: Run, tmp_path: Path) -> None:
    models = save_models(tmp_path)
    logs = tmp_path / "logs-base", tmp_path / "logs-tuned"
    names = [*ACCURACIES, "technical_english"]
    script = BY_HAND.replace("TASKS", ",".join(names)).replace("LIMIT", str(LIMIT))
    subprocess.run([sys.executable, "-c", script, *models, *logs], cwd=BUNDLED, check=True, capture_output=True)
    by_logs = run("measure", "--samples", *logs)
    chosen = ", ".join(f"{{name: {name}, limit: {LIMIT}}}" for name in names)
    by_models = run("measure", *models, *("--set", f"evaluate.benchmarks=[{chosen}]", "--set", "probe.rows=4"),
                    "--set", "probe.length=8")  # fmt: skip
    ours, theirs = benchmarks_in(by_models), benchmarks_in(by_logs)
    assert {name: theirs[name] for name in (*ACCURACIES, "mean")} == {
        name: ours[name] for name in (*ACCURACIES, "mean")
    }
    assert sum(abs(ours[name]["forgetting"]["value"]) for name in ACCURACIES) > 0.1
    per_token, per_word = (side["technical_english"]["forgetting"] for side in (ours, theirs))
    assert (per_token["unit"], per_word["unit"]) == ("nats/token", "nats/word")
    assert per_word["value"] / per_token["value"] == pytest.approx(
        theirs["technical_english"]["base"] / ours["technical_english"]["base"], rel=1e-4
    )
    report = Path(by_logs.stdout.splitlines()[-1]).with_name("report.html").read_text()
    assert "tuned" in report and "nats/word" in report


BASE, TUNED = LOGS / "0.4.5", LOGS / "0.4.9.1"


def test_other_arguments_of_the_model_are_said(tmp_path: Path) -> None:
    base, tuned = (Path(shutil.copytree(LOGS / "0.4.9.1", tmp_path / name)) for name in ("base", "tuned"))
    alike = list(_given_otherwise(logs_in(base), logs_in(tuned)))
    edit(tuned, lambda content: content.update(max_length=22))
    edit(tuned, lambda content: content["config"].update(model_args="pretrained=model,add_bos_token=True"))
    said = list(_given_otherwise(logs_in(base), logs_in(tuned)))
    assert alike == [] and said == [
        "In lm-eval, max_length was 64 for the base and 22 for the tuned model, to which prompts are cut; this alone "
        "may change scores.",
        "In lm-eval, add_bos_token was its default for the base and True for the tuned model; this alone may change "
        "scores.",
    ]


def test_a_plan_says_what_would_be_compared(capsys: pytest.CaptureFixture[str]) -> None:
    measure_command(str(BASE), str(TUNED), samples=True, benchmark=["sums", "prose"], plan=True)
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines()]
    assert ["sums", "exact_match", "3", "0"] in rows and ["prose", "word_perplexity", "3", "0"] in rows
    assert "words" not in said and "nothing is computed by a model" in said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tuned": str(BASE)}, "is given twice"),
        ({"benchmark": ["hellaswag"]}, "no benchmark hellaswag in the logs; there are checks, last_word"),
        ({"target": Path("rows.jsonl")}, "--target: with --samples there are logs and no models"),
        ({"machine": ["threads=1"]}, "--machine: with --samples there are logs and no models"),
        ({"set_": ["probe.rows=8"]}, "--set probe: with --samples there are logs and no models"),
        ({"set_": ["evaluate.held_out_rows=8"]}, "held_out_rows: with --samples there are logs"),
        (
            {"set_": ["evaluate.benchmarks=[{name: words, limit: 2}]"]},
            "limit cannot be set, since its logs are written",
        ),
        ({"samples": False, "plan": True}, "--plan is for --samples"),
        ({"margin": 100}, "--margin 100 is not possible"),
        ({"base": "tiny", "tuned": "tiny", "samples": False, "margin": 2}, "--margin is of benchmarks, and none is"),
    ],
)
def test_a_mistake_ends_before_a_server_starts(given: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        measure_command(**{"base": str(BASE), "tuned": str(TUNED), "samples": True} | given)


def test_a_failure_is_no_verdict(tmp_path: Path) -> None:
    """1 means that something was lost."""
    other = Path(shutil.copytree(TUNED, tmp_path / "other"))
    edit_samples(other, "words", lambda samples: samples[0].update(filtered_resps=[["nan", "False"]] * 3))
    command = [sys.executable, "-m", "flows.measure", "--samples", str(BASE), str(other), "--margin", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert (done.returncode, "log-likelihood is nan" in done.stderr) == (NO_VERDICT, True), done.stderr


def test_what_does_not_agree_is_bad_input(tmp_path: Path) -> None:
    other = Path(shutil.copytree(TUNED, tmp_path / "other"))
    edit(other, lambda content: content["n-shot"].update(words=0))
    edit_samples(other, "sums", lambda samples: samples[0].update(doc_hash="ab"))
    command = [sys.executable, "-m", "flows.measure", "--samples", str(BASE), str(other)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "words: its examples in the prompt (num_fewshot) is 1 (base) and 0 (tuned)" in done.stderr
    assert "sums: 1 of 3 documents are others (doc_hash; first: 0)" in done.stderr
    assert "--benchmark checks --benchmark last_word --benchmark prose" in done.stderr
