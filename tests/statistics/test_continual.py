"""Several targets in turn: signs and denominators of what is read from the R matrix."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from cfsd.statistics.continual import Stability, continual, described, stability
from cfsd.statistics.figures import Figure
from cfsd.statistics.forgetting import BenchmarkForgetting, Measure, benchmark_forgetting

NAN = float("nan")
TARGETS = ("sums", "maps", "poems")
# Stage 0 is the base; the first target is best at stage 2, thanks to the second.
SCORES = [
    [0.10, 0.20, 0.30],
    [0.80, 0.25, NAN],
    [0.85, 0.70, NAN],
    [0.60, 0.50, 0.90],
]  # fmt: skip
TRANSFER = [0.60 - 0.80, 0.50 - 0.70]
FORGETTING = [0.85 - 0.60, 0.70 - 0.50]


def found(scores: Any = SCORES, **more: Any) -> Any:
    settings: dict[str, Any] = {"higher_is_better": True, "unit": "fraction"} | more
    return continual(TARGETS, scores, **settings)


def test_transfer_counts_from_each_target_s_own_stage_and_forgetting_from_its_best() -> None:
    read = found()
    assert read.transfer == pytest.approx(TRANSFER)
    assert read.forgetting == pytest.approx(FORGETTING)
    assert read.backward_transfer.value == pytest.approx(sum(TRANSFER) / 2)
    assert read.average_forgetting.value == pytest.approx(sum(FORGETTING) / 2)
    assert read.average_forgetting.low is None
    assert read.matrix[1] == (0.8, 0.25, None)


def test_losses_have_the_same_signs() -> None:
    losses, read = -np.array(SCORES), found()
    assert found(losses, higher_is_better=False) == read


def test_the_base_is_no_stage_to_forget_from() -> None:
    better_base = [[0.99, 0.99, 0.3], *SCORES[1:]]
    assert found(better_base).forgetting == found().forgetting


def test_a_stage_before_the_target_s_own_counts_for_its_best() -> None:
    scores = np.array(SCORES)
    scores[1, 1] = 0.75
    assert found(scores).forgetting == pytest.approx([0.25, 0.25])


def test_a_model_that_never_changes_forgets_exactly_nothing() -> None:
    read = found(np.full((4, 3), 0.5))
    assert (str(read.backward_transfer.value), str(read.average_forgetting.value)) == ("0.0", "0.0")


def test_paired_changes_give_backward_transfer_its_interval() -> None:
    changes = [Figure(value=v, low=v - 0.06, high=v + 0.08, unit="fraction") for v in TRANSFER]
    transfer = found(changes=changes).backward_transfer
    half = np.sqrt(2) / 2
    assert (transfer.low, transfer.high) == pytest.approx((-0.2 - 0.06 * half, -0.2 + 0.08 * half))
    with pytest.raises(ValueError, match="positive = better"):
        found(changes=[change.scaled(2, "fraction") for change in changes])
    unknown = [change.model_copy(update={"low": None, "high": None}) for change in changes]
    assert found(changes=unknown).backward_transfer.low is None


def test_a_single_target_has_nothing_before_it() -> None:
    read = continual(["sums"], [[0.1], [0.8]], higher_is_better=True, unit="fraction")
    assert (read.backward_transfer, read.average_forgetting, read.transfer) == (None, None, ())
    assert "none with a single target" in described(read)


def test_scores_that_are_needed_are_named() -> None:
    scores = np.array(SCORES)
    scores[3, 1] = NAN
    with pytest.raises(ValueError, match="target maps at stage 3 is nan"):
        found(scores)
    scores[3, 1] = np.inf
    with pytest.raises(ValueError, match="target maps at stage 3 is inf"):
        found(scores)
    with pytest.raises(ValueError, match=r"shape \(3, 3\); 3 targets need \(4, 3\)"):
        found(scores[1:])


# --- general benchmarks


def stage(lost: int, gained: int = 0, metric: str = "acc", higher_is_better: bool = True) -> BenchmarkForgetting:
    before = np.repeat([1.0, 0.0], [60, 40])
    after = before.copy()
    after[:lost], after[60 : 60 + gained] = 0.0, 1.0
    frames = (
        pd.DataFrame({"doc_id": range(100), "filter": "none", "doc_hash": "same", "value": values, "count": 1.0})
        for values in (before, after)
    )
    measure = Measure(metric=metric, higher_is_better=higher_is_better, chance=None, kind="binary")
    return benchmark_forgetting("quiz", measure, *frames)


def test_the_worst_stage_is_not_the_last() -> None:
    stages = [stage(5), stage(30), stage(10)]
    held = stability(stages)
    assert held.scores == pytest.approx((0.6, 0.55, 0.3, 0.5))
    assert held.final == stages[-1].forgetting
    assert held.worst == pytest.approx(0.3)
    assert held.worst_stage == 2


def test_for_a_metric_that_is_better_when_lower_the_worst_is_the_highest() -> None:
    held = stability([stage(0, 20, "toxic", False), stage(0, 5, "toxic", False), stage(30, 0, "toxic", False)])
    assert held.final.value == pytest.approx(-0.3)
    assert held.worst == pytest.approx(0.2)
    assert held.worst_stage == 1


def test_stages_of_several_benchmarks_are_refused() -> None:
    with pytest.raises(ValueError, match="2 stages of 2 kinds"):
        stability([stage(5), stage(5, metric="f1")])
    with pytest.raises(ValueError, match="0 stages"):
        stability([])


def test_every_number_is_printed_with_its_definition() -> None:
    held = stability([stage(5), stage(30)])
    assert isinstance(held, Stability)
    text = described(held)
    assert "worst: 0.3 at stage 2\n  " + held.definitions["worst"] in text
    low, high = held.final.low, held.final.high
    assert f"final: 0.3 ({low:.4g} to {high:.4g}) fraction\n  {held.definitions['final']}" in text
    matrix = described(found())
    assert "stage 1: 0.8 0.25 -" in matrix
    assert "backward_transfer: -0.2 fraction\n  1/(T-1)" in matrix
    assert "average_forgetting: 0.225 fraction\n  1/(T-1)" in matrix


def test_a_metric_that_does_not_apply_to_some_answers_has_other_documents_at_each_stage() -> None:
    stages = [stage(5), stage(6).model_copy(update={"num_documents": 99, "base": 0.5})]
    assert stability(stages).scores == (0.5, stages[0].tuned, stages[1].tuned)
