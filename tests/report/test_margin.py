"""The verdict on two models with a margin, in words: what is not in points is named, and does not pass unseen."""

import json
from pathlib import Path
from typing import Any

from cfsd.report.margin import write_verdict
from cfsd.statistics.forgetting import NO_SCORE
from tests.report.test_report import benchmark, figure, summary


def judged(folder: Path, **benchmarks: Any) -> tuple[str, str]:
    known = summary("m", 0.0, half=0.001).benchmarks
    return write_verdict(folder, summary("m", 0.0, half=0.001).model_copy(update={"benchmarks": known | benchmarks}), 2)


def test_a_benchmark_that_is_not_in_points_is_named_and_keeps_a_pass_from_being_said(tmp_path: Path) -> None:
    steady = benchmark(0.0, 0.5) | {"higher_is_better": False}
    outcome, said = judged(tmp_path, errors=steady)
    assert (outcome, said) == (
        "pass",
        "PASS: none of 2 figures lost 2 points (not judged: errors, of which less is better)",
    )
    fallen = benchmark(40.0, 1.0) | {"retention_note": NO_SCORE}
    outcome, said = judged(tmp_path, errors=steady, chrf=fallen)
    assert outcome == json.loads((tmp_path / "verdict.json").read_text())["outcome"] == "cannot tell"
    assert said == (
        "CANNOT TELL whether more than 2 points were lost: chrf became worse, which is not in points (not judged: "
        f"errors, of which less is better; chrf, {NO_SCORE})"
    )


def test_a_name_stays_in_its_cell(tmp_path: Path) -> None:
    judged(tmp_path, **{"lead|arc<b>": benchmark(0.0, 0.001)})
    assert "| lead\\|arc\\<b> | 0 | -0.1 to 0.1 | 2 | " in (tmp_path / "verdict.md").read_text()


def test_the_mean_of_one_benchmark_is_not_judged_beside_it(tmp_path: Path) -> None:
    """Of two choices the mean above chance is twice the loss: it failed although nothing lost more than the margin."""
    lost = summary("m", 0.0).model_copy(
        update={"benchmarks": {"b": benchmark(0.018, 0.004)}, "mean_forgetting": figure(0.036, 0.004)}
    )
    outcome, said = write_verdict(tmp_path, lost, 2)
    assert outcome == "cannot tell" and "mean_forgetting" not in said
    two = lost.model_copy(update={"benchmarks": {n: benchmark(0.018, 0.004) for n in ("b", "c")}})
    outcome, said = write_verdict(tmp_path, two, 2)
    assert outcome == "fail" and said == "FAIL: lost more than 2 points: mean_forgetting (above chance) 3.6"


def test_a_loss_just_above_the_margin_is_not_written_as_the_margin(tmp_path: Path) -> None:
    lost = summary("m", 0.0).model_copy(update={"benchmarks": {"b": benchmark(0.05004, 0.00001)}})
    assert write_verdict(tmp_path, lost, 5)[1] == "FAIL: lost more than 5 points: b 5.004"
