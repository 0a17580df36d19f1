"""What rehearsal costs in the study, in passes of tokens through the model, and what each point saved costs."""

from collections.abc import Iterator
from statistics import mean
from typing import Any

from benchmarks._methods_grid import PLAIN
from benchmarks._result import markdown
from cfsd.report.table import by_variant

SAVED = "instructions"
HEADS = [
    "part: variant", "tokens sampled", "tokens trained on", "passes, times plain", "points saved", "passes per point",
]  # fmt: skip
PASSES = 3  # of a token that is trained on: forward, and backward by inputs and by weights; a sampled one has one


def block(parts: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield a row per variant that rehearses a corpus and was scored on the benchmark SAVED."""
    rows = [HEADS]
    for part, content in parts.items():
        groups = by_variant(run for run in content["variants"].items() if _counts(run[1]))
        plain = groups.get(PLAIN, [])
        rows += [_row(f"{part}: {name}", runs, plain) for name, runs in groups.items() if plain and _sampled(runs)]
    yield (
        f"A pass is a token going once through the model: {PASSES} for one that is trained on, one for one that is "
        f"sampled. Points saved: of {SAVED}, against `{PLAIN}` of the same part; passes per point, in thousands, are "
        "those beyond plain fine-tuning's. The corpus is sampled once for all trainings on a base and counted whole "
        "here.\n"
    )
    yield markdown(rows)


def _counts(figures: dict[str, Any]) -> bool:
    return SAVED in figures["benchmarks"] and "corpus_tokens" in figures["training"]


def _row(label: str, runs: list[dict[str, Any]], plain: list[dict[str, Any]]) -> list[str]:
    before, passes, saved = _passes(plain), _passes(runs), _lost(plain) - _lost(runs)
    per_point = f"{(passes - before) / saved / 1000:.1f}" if saved > 0 else "none saved"
    trained = mean(run["training"]["tokens"] for run in runs)
    return [label, f"{_sampled(runs):,.0f}", f"{trained:,.0f}", f"{passes / before:.2f}", f"{saved:.1f}", per_point]


def _sampled(runs: list[dict[str, Any]]) -> float:
    return mean(float(run["training"]["corpus_tokens"]) for run in runs)


def _passes(runs: list[dict[str, Any]]) -> float:
    return PASSES * mean(float(run["training"]["tokens"]) for run in runs) + _sampled(runs)


def _lost(runs: list[dict[str, Any]]) -> float:
    return 100 * mean(float(run["benchmarks"][SAVED]["forgetting"]["value"]) for run in runs)
