"""The comparisons of the study on a base of the user's own, which may have no chat template."""

from typing import Any

from cfsd.comparison import Comparison
from cfsd.evaluate.benchmark import Benchmark
from cfsd.generate.spec import CHATS


def fitted(comparison: Comparison) -> tuple[Comparison, list[str]]:
    """Return the comparison without what needs a chat template that its base lacks, and notes on what was changed."""
    if comparison.recipe.base.has_chat_template() is not False:
        return comparison, []
    evaluate = comparison.recipe.evaluate
    benchmarks = tuple(map(_completion, evaluate.benchmarks))
    recipe = comparison.recipe.model_copy(update={"evaluate": evaluate.model_copy(update={"benchmarks": benchmarks})})
    kept = {field: _without_chats(getattr(comparison, field)) for field in ("variants", "sweeps")}
    found = comparison.model_copy(update={"recipe": recipe, **kept})
    dropped = [name for field, left in kept.items() for name in getattr(comparison, field) if name not in left]
    notes = [f"without {name}: the base has no chat template" for name in dropped]
    pairs = zip(evaluate.benchmarks, benchmarks, strict=True)
    return found, notes + [f"{new.name} in place of {old.name}" for old, new in pairs if new != old]


def _completion(benchmark: Benchmark) -> Benchmark:
    other = benchmark.completion() if benchmark.is_chat() else None
    return benchmark.model_copy(update={"name": other}) if other else benchmark


def _without_chats(varied: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: changes for name, changes in varied.items() if not _samples_chats(changes)}


def _samples_chats(changes: dict[str, Any]) -> bool:
    return CHATS in (changes.get("generate.source"), *changes.get("generate.fractions", {}))
