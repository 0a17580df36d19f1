"""What a stage will cost: tokens, memory and time, from settings alone. Rough: within a factor of two.

FLOPs per token: 2 x parameters forward, 6 x with the backward pass (Kaplan et al. 2020, arXiv:2001.08361, 2.1).
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from cfsd.machine import Machine, home
from cfsd.model.checkpoint import count_parameters
from cfsd.recipe import Recipe
from cfsd.store.artifact import Artifact, Store
from cfsd.train.memory import Shapes, load_of, training_memory

GIB = 2**30
FLOPS_PER_SECOND = {
    "cpu": 60e9,
    "cuda": 1e14,
}  # reached in practice: two CPU cores; one large GPU in bfloat16
DECODING_SHARE = 0.5  # of that rate, when each token waits for the one before
KNOWN_PARAMETERS = {"smollm2": 134_515_008, "tiny": 177_088}
KNOWN_SHAPES = {
    "smollm2": Shapes(576, 30, 1536, heads=9, kv_heads=3, vocabulary=49_152, tied=True),
    "tiny": Shapes(64, 4, 128, heads=2, kv_heads=2, vocabulary=100),
}
COMPUTING = {  # stages that hold the model, and how many times its weights' memory: gradients and moments count too
    "probe": 1, "generate": 1, "embed": 1, "weigh": 1, "evaluate": 1, "evaluate-target": 1, "evaluate-probe": 2,
    "budget": 4, "evaluate-text": 1, "evaluate-target-divergence": 2, "check": 1, "fisher": 3, "train": 4,
}  # fmt: skip
TRIES = 3  # of alpha, until the budget is kept: docs/decisions/0015
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
    known: Any = base.metadata.get("parameters") or KNOWN_PARAMETERS.get(recipe.base.kind)
    return float(known) if known else None


def shapes_of(recipe: Recipe, base: Artifact) -> Shapes | None:
    """Return the model's sizes, from its config.json where it is on this machine already."""
    folder = Path(recipe.base.path) if recipe.base.path else Store(home()).path(base) if base.content else None
    config = folder / "config.json" if folder else None
    if config and config.exists():
        return Shapes.of_config(json.loads(config.read_text()))
    return KNOWN_SHAPES.get(recipe.base.kind)


def estimate(stage: str, recipe: Recipe, base: Artifact, target: Artifact, machine: Machine) -> Estimate:
    """Return what `stage` of `recipe` costs on `machine`."""
    weights = parameters_of(recipe, base)
    tokens = _tokens(stage, recipe, target)
    memory = _memory(stage, recipe, base, machine)
    if weights is None or tokens is None:
        return Estimate(tokens, memory, None)
    rate = FLOPS_PER_SECOND[machine.resolved_device()]
    if stage == "train" and machine.resolved_device() == "cuda":
        rate *= machine.resolved_training_processes()
    if stage in ("probe", "generate"):
        rate *= DECODING_SHARE
    return Estimate(tokens, memory, _passes(stage, recipe, machine) * 2 * weights * tokens / rate)


def _passes(stage: str, recipe: Recipe, machine: Machine) -> float:
    """Return how many forward passes a token costs; the way back is two."""
    if stage in ("evaluate-probe", "evaluate-target-divergence"):
        return 2
    if stage == "budget":
        return 2 * TRIES
    if stage == "fisher":
        return 3
    return 3 + machine.gradient_checkpointing if stage == "train" else 1


def _memory(stage: str, recipe: Recipe, base: Artifact, machine: Machine) -> float | None:
    """Return bytes per process."""
    shapes = shapes_of(recipe, base)
    if stage == "train" and shapes:
        return training_memory(shapes, load_of(recipe.train, machine)).total()
    weights = parameters_of(recipe, base)
    vocabulary: float = shapes.vocabulary if shapes else float(str(base.metadata.get("vocabulary", 50_000)))
    if weights is None or stage not in COMPUTING:
        return None
    copies = COMPUTING[stage]
    return float(4 * weights * copies) + (16 if copies > 2 else 8) * machine.micro_batch_tokens * vocabulary


def _tokens(stage: str, recipe: Recipe, target: Artifact) -> float | None:
    if stage in ("probe", "evaluate-probe", "budget"):
        return recipe.probe.rows * recipe.probe.length
    if stage == "generate":
        return recipe.generate.rows * recipe.generate.length
    if stage == "evaluate":
        return BENCHMARK_TOKENS
    metadata: Any = target.metadata
    if stage in ("evaluate-target", "evaluate-target-divergence"):
        return float(metadata["held_out_tokens"]) if "held_out_tokens" in metadata else None
    if stage == "fisher":
        needed = recipe.train.methods.estimate()
        return needed.rows * recipe.generate.length if needed else None
    if stage == "weigh":
        return float(metadata["train_tokens"]) if "train_tokens" in metadata else None
    if stage == "train" and "train_rows" in metadata:
        steps = recipe.train.epochs * -(-metadata["train_rows"] // recipe.mix.target_rows)
        rehearsed = recipe.mix.rehearsal_tokens if recipe.generate.rows and recipe.train.rehearsal.weight else 0
        return float(recipe.train.epochs * metadata["train_tokens"] + steps * rehearsed)
    return None


def disk_bytes(recipe: Recipe, weights: float | None) -> float:
    """Return about how many bytes the artifacts of `recipe` take, a checkpoint while training included."""
    corpus = recipe.generate.rows * recipe.generate.length
    stored = 4 * recipe.generate.top_logprobs * corpus  # an id and a log-probability, two bytes each
    return 16 * (recipe.probe.rows * recipe.probe.length + corpus) + stored + 20 * (weights or 0)
