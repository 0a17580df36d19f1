"""What rehearsal costs in the study, in passes of tokens through the model, and what each point saved costs."""

from collections.abc import Iterator
from statistics import mean
from typing import Any

from benchmarks._methods_grid import PLAIN
from benchmarks._result import markdown
from cfsd.report.compared import Compared, Comparisons
from cfsd.report.table import POINTS, by_variant, shown

SAVED = "instructions"
HEADS = [
    "part: variant", "corpus tokens", "tokens trained on", "passes, times plain", "points saved", "passes per point",
]  # fmt: skip
PASSES = 3  # of a token that is trained on: forward, and backward by inputs and by weights; one of the corpus has one


def block(parts: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield a row per variant that rehearses a corpus and was scored on the benchmark SAVED."""
    rows = [HEADS]
    for part, content in parts.items():
        groups = by_variant(run for run in content["variants"].items() if _counts(run[1]))
        plain = groups.get(PLAIN, [])
        compared = Comparisons([Compared.model_validate(entry) for entry in content["comparisons"]])
        rows += [
            _row(f"{part}: {name}", runs, plain, compared.of(PLAIN, name, f"benchmarks/{SAVED}"))
            for name, runs in groups.items() if plain and _rehearses(runs)
        ]  # fmt: skip
    yield (
        f"A pass is a token going once through the model: {PASSES} for one that is trained on, one for one of the "
        "corpus, which is sampled, or read and scored, once for all trainings on a base and counted whole here; what "
        f"FLOW's weights take is not counted. Points saved: of {SAVED}, against `{PLAIN}` of the same part, paired; "
        "passes per point, in thousands, are those beyond plain fine-tuning's, where a saving is found.\n"
    )
    yield markdown(rows)


def _counts(figures: dict[str, Any]) -> bool:
    return SAVED in figures["benchmarks"] and "corpus_tokens" in figures["training"]


def _rehearses(runs: list[dict[str, Any]]) -> bool:
    return all(run["training"]["rehearsal_tokens"] for run in runs)


def _row(label: str, runs: list[dict[str, Any]], plain: list[dict[str, Any]], saved: Compared | None) -> list[str]:
    assert saved is not None, f"{label} was compared with {PLAIN}"
    before, passes, trained = _passes(plain), _passes(runs), mean(run["training"]["tokens"] for run in runs)
    found = saved.sign() == 1
    per_point = f"{(passes - before) / (POINTS * saved.value) / 1000:.1f}" if found else "-"
    points = shown(saved.figure(), POINTS)
    return [label, f"{_corpus(runs):,.0f}", f"{trained:,.0f}", f"{passes / before:.2f}", points, per_point]


def _corpus(runs: list[dict[str, Any]]) -> float:
    return mean(float(run["training"]["corpus_tokens"]) for run in runs)


def _passes(runs: list[dict[str, Any]]) -> float:
    return PASSES * mean(float(run["training"]["tokens"]) for run in runs) + _corpus(runs)
