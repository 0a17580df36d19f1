"""What a stage will cost: tokens, memory and time, from settings alone. Rough: within a factor of two.

FLOPs per token: 2 x parameters forward, 6 x with the backward pass (Kaplan et al. 2020, arXiv:2001.08361, 2.1).
"""

from pathlib import Path
from typing import Any, NamedTuple

from cfsd.artifact import Artifact
from cfsd.checkpoint import count_parameters
from cfsd.recipe import Recipe

GIB = 2**30
FLOPS_PER_SECOND = {
    "cpu": 60e9,
    "cuda": 1e14,
}  # reached in practice: two CPU cores; one large GPU in bfloat16
DECODING_SHARE = 0.5  # of that rate, when each token waits for the one before
KNOWN_PARAMETERS = {"smollm2": 134_515_008, "tiny": 177_088}
BENCHMARK_TOKENS = 5000  # per benchmark, where no limit tells


class Estimate(NamedTuple):
    """Tokens that pass through the model, bytes of memory, seconds. None: not known before earlier stages ran."""

    tokens: float | None
    memory: float | None
    seconds: float | None


def parameters_of(recipe: Recipe, base: Artifact) -> float | None:
    """Return the number of weights, as far as it is known before the model is fetched."""
    if recipe.base.kind == "folder" and recipe.base.path:
        return float(count_parameters(Path(recipe.base.path)))
    known: Any = base.facts.get("parameters") or KNOWN_PARAMETERS.get(recipe.base.kind)
    return float(known) if known else None


def estimate(
    stage: str, recipe: Recipe, base: Artifact, target: Artifact, device: str, micro_batch_tokens: int
) -> Estimate:
    """Return what `stage` of `recipe` costs."""
    weights = parameters_of(recipe, base)
    vocabulary: Any = base.facts.get("vocabulary", 50_000)
    tokens = _tokens(stage, recipe, target)
    if weights is None or tokens is None:
        return Estimate(tokens, None, None)
    rate = FLOPS_PER_SECOND[device]
    if stage == "train":  # float32 weights, gradients and two AdamW moments; logits, their log-softmax and gradients
        return Estimate(tokens, 16 * weights + 16 * micro_batch_tokens * vocabulary, 6 * weights * tokens / rate)
    models = 2 if stage == "evaluate-probe" else 1
    speed = rate * (DECODING_SHARE if stage in ("probe", "generate") else 1)
    memory = 4 * weights * models + 8 * micro_batch_tokens * vocabulary
    return Estimate(tokens, memory, 2 * models * weights * tokens / speed)


def _tokens(stage: str, recipe: Recipe, target: Artifact) -> float | None:
    if stage in ("probe", "evaluate-probe"):
        return recipe.probe.rows * recipe.probe.length
    if stage == "generate":
        return recipe.generate.rows * recipe.generate.length
    if stage == "evaluate":
        return BENCHMARK_TOKENS
    facts: Any = target.facts
    if stage == "evaluate-target":
        return float(facts["held_out_tokens"]) if "held_out_tokens" in facts else None
    if stage == "train" and "train_rows" in facts:
        steps = recipe.train.epochs * -(-facts["train_rows"] // recipe.mix.target_rows)
        rehearsed = recipe.mix.rehearsal_tokens if recipe.generate.rows and recipe.train.rehearsal_weight else 0
        return float(recipe.train.epochs * facts["train_tokens"] + steps * rehearsed)
    return None


def disk_bytes(recipe: Recipe, weights: float | None) -> float:
    """Return about how many bytes the artifacts of `recipe` take, a checkpoint while training included."""
    corpus = recipe.generate.rows * recipe.generate.length
    stored = 4 * recipe.generate.top_logprobs * corpus  # an id and a log-probability, two bytes each
    return 16 * (recipe.probe.rows * recipe.probe.length + corpus) + stored + 20 * (weights or 0)
