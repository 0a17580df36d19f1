"""The verdict on two models with a margin."""

import numpy as np
import pandas as pd
import pytest

from cfsd.statistics.figures import MEAN, Figure
from cfsd.statistics.forgetting import BenchmarkForgetting, Measure, benchmark_forgetting, mean_forgetting
from cfsd.statistics.margin import judge_losses, unguarded

ACCURACY = Measure(metric="acc", higher_is_better=True, chance=0.25, kind="binary")
PERPLEXITY = Measure(metric="word_perplexity", higher_is_better=False, chance=None, kind="perplexity", per="word")


def lost(
    name: str, right_before: int, right_after: int, documents: int, measure: Measure = ACCURACY
) -> BenchmarkForgetting:
    """Return a benchmark of which the first documents were right."""

    def side(right: int) -> pd.DataFrame:
        rows = {"filter": "none", "doc_id": range(documents), "doc_hash": "a", "count": 1}
        return pd.DataFrame(rows | {"value": (np.arange(documents) < right).astype(float)})

    return benchmark_forgetting(name, measure, side(right_before), side(right_after))


@pytest.mark.parametrize(
    ("after", "documents", "outcome"),
    [
        (790, 1000, "pass"),  # 1 point, the interval ends below 5
        (600, 1000, "fail"),  # 20 points
        (795, 1000, "pass"),
        (750, 1000, "cannot tell"),  # 5 points: at the margin
        (70, 100, "cannot tell"),  # as many points as 0.3 % of all chance would give
        (820, 1000, "pass"),  # better
    ],
)
def test_the_outcome_of_one_benchmark(after: int, documents: int, outcome: str) -> None:
    before = 800 if documents == 1000 else 76
    (finding,) = judge_losses([lost("facts", before, after, documents)], None, 0.05).findings
    assert finding.outcome == outcome and (finding.needed != "") == (outcome == "cannot tell")


def test_what_is_needed_decides() -> None:
    (finding,) = judge_losses([lost("facts", 76, 75, 100)], None, 0.03).findings
    documents = int(finding.needed.split()[1].replace(",", ""))
    assert finding.outcome == "cannot tell" and documents > 100
    more = lost("facts", round(0.76 * documents), round(0.75 * documents), documents)
    assert judge_losses([more], None, 0.03).outcome == "pass"


def test_the_worst_decides_and_the_mean_counts() -> None:
    both = [lost("facts", 800, 800, 1000), lost("wording", 800, 600, 1000)]
    mean = mean_forgetting(both)
    judged = judge_losses(both, mean, 0.05)
    assert judged.outcome == "fail" and [f.name for f in judged.findings] == ["wording", MEAN, "facts"]
    assert judged.findings[1].worsening == pytest.approx(0.2 / 0.75 / 2)


def test_what_is_no_score_is_not_guarded() -> None:
    text = lost("prose", 800, 100, 1000, PERPLEXITY)
    assert text.forgetting.unit == "nats/word" and unguarded([text, lost("facts", 8, 8, 10)]) == {
        "prose": "of which less is better"
    }
    assert judge_losses([text], None, 0.05).outcome == "cannot tell"


def test_too_few_documents_cannot_tell() -> None:
    unknown = Figure(value=0.5, low=None, high=None, unit="fraction")
    (finding,) = judge_losses([lost("facts", 3, 0, 3).model_copy(update={"forgetting": unknown})], None, 0.05).findings
    assert finding.outcome == "cannot tell" and finding.needed == "5 documents or more"
    assert '"low":null,"high":null' in finding.model_dump_json()
    (finding,) = judge_losses([lost("facts", 76, 70, 100)], None, 0.02).findings
    enough = int(finding.needed.split()[1])
    assert finding.outcome == "cannot tell" and enough > 100
    assert (
        judge_losses([lost("facts", round(0.76 * enough), round(0.7 * enough), enough)], None, 0.02).outcome == "fail"
    )
