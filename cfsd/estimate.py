"""What a stage will cost: tokens, memory and time, from settings alone, within a factor of two.

FLOPs per token: 2 x parameters forward, 6 x with the backward pass (Kaplan et al. 2020, arXiv:2001.08361, 2.1).
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cfsd import stages
from cfsd.machine import Machine, home
from cfsd.model.folder import count_parameters
from cfsd.recipe import Recipe
from cfsd.store.artifact import Artifact, Store
from cfsd.train.memory import Shapes, load_of, training_memory

GIB = 2**30
FLOPS_PER_SECOND = {"cpu": 60e9, "cuda": 1e14}  # reached in practice: two CPU cores; one large GPU in bfloat16
DECODING_SHARE = 0.5  # of that rate, when each token waits for the one before
KNOWN_SHAPES = {
    "smollm2": Shapes(576, 30, 1536, heads=9, kv_heads=3, vocabulary=49_152, tied=True),
    "tiny": Shapes(64, 4, 128, heads=2, kv_heads=2, vocabulary=99),
}
TRIES = 3  # of alpha, until the budget is met: docs/decisions/0015
BENCHMARK_TOKENS = 5000  # of a benchmark, a guess
Metadata = Mapping[str, Any]  # of the target


class Estimate(NamedTuple):
    """Tokens that pass through the model, bytes of memory, seconds. None: unknown until earlier stages have run."""

    tokens: float | None
    memory: float | None
    seconds: float | None


class Stage(NamedTuple):
    """A stage that holds the model: its tokens, its memory in copies of the weights, forward passes per token.

    Gradients and moments count as copies; a backward pass counts as two forward ones.
    """

    tokens: Callable[[Recipe, Metadata], float | None] = lambda recipe, target: None
    copies: int = 1
    passes: float = 1


def _probe(recipe: Recipe, target: Metadata) -> float:
    return recipe.probe.rows * recipe.probe.length


def _answers(recipe: Recipe, target: Metadata) -> float | None:
    """Return the tokens of one set of prompts, on average: a stage does not say which it is."""
    sets = recipe.evaluate.prompts
    return sum(prompts.rows * prompts.length for prompts in sets) / len(sets) if sets else None


def _held_out(recipe: Recipe, target: Metadata) -> float | None:
    return target.get("held_out_tokens")


def _curvature(recipe: Recipe, target: Metadata) -> float | None:
    needed = recipe.train.methods.estimate()
    return needed.rows * recipe.generate.length if needed else None


def _training(recipe: Recipe, target: Metadata) -> float | None:
    if "train_rows" not in target:
        return None
    steps = recipe.train.epochs * -(-target["train_rows"] // recipe.mix.target_rows)
    rehearsed = recipe.mix.rehearsal_tokens if recipe.generate.rows and recipe.train.rehearsal.weight else 0
    return float(recipe.train.epochs * target["train_tokens"] + steps * rehearsed)


STAGES = {
    stages.PROBE: Stage(_probe),
    stages.PROMPTS: Stage(_answers),
    stages.GENERATE: Stage(lambda recipe, target: recipe.generate.rows * recipe.generate.length),
    stages.EMBED: Stage(),
    stages.WEIGH: Stage(lambda recipe, target: target.get("train_tokens")),
    stages.CHECK: Stage(),
    stages.FISHER: Stage(_curvature, copies=3, passes=3),
    stages.TRAIN: Stage(_training, copies=4, passes=3),
    stages.BUDGET: Stage(_probe, copies=4, passes=2 * TRIES),
    stages.EVALUATE: Stage(lambda recipe, target: BENCHMARK_TOKENS),
    stages.EVALUATE_TEXT: Stage(),
    stages.EVALUATE_TARGET: Stage(_held_out),
    stages.EVALUATE_TARGET_DIVERGENCE: Stage(_held_out, copies=2, passes=2),
    stages.EVALUATE_PROBE: Stage(_probe, copies=2, passes=2),
    stages.EVALUATE_PROMPTS: Stage(_answers, copies=2, passes=2),
}


def parameters_of(recipe: Recipe, base: Artifact) -> float | None:
    """Return the number of weights, None if it is unknown until the model is fetched."""
    if recipe.base.kind == "folder" and recipe.base.path:
        return float(count_parameters(Path(recipe.base.path)))
    shapes = KNOWN_SHAPES.get(recipe.base.kind)
    parameters: Any = base.metadata.get("parameters") or (shapes and shapes.parameters())
    return float(parameters) if parameters else None


def shapes_of(recipe: Recipe, base: Artifact) -> Shapes | None:
    """Return the model's sizes, from its config.json if it is on this machine."""
    folder = Path(recipe.base.path) if recipe.base.path else Store(home()).path(base) if base.content else None
    config = folder / "config.json" if folder else None
    if config and config.exists():
        return Shapes.of_config(json.loads(config.read_text()))
    return KNOWN_SHAPES.get(recipe.base.kind)


def estimate(stage: str, recipe: Recipe, base: Artifact, target: Artifact, machine: Machine) -> Estimate:
    """Return what `stage` of `recipe` costs on `machine`."""
    weights = parameters_of(recipe, base)
    work = STAGES.get(stage, Stage(copies=0))
    tokens = work.tokens(recipe, target.metadata)
    memory = _memory(stage, work.copies, recipe, base, machine)
    if weights is None or tokens is None:
        return Estimate(tokens, memory, None)
    rate, passes = FLOPS_PER_SECOND[machine.resolved_device()], work.passes
    if stage == stages.TRAIN:
        passes += machine.gradient_checkpointing
        rate *= machine.resolved_training_processes() if machine.resolved_device() == "cuda" else 1
    if stage in stages.SAMPLING:
        rate *= DECODING_SHARE
    return Estimate(tokens, memory, passes * 2 * weights * tokens / rate)


def _memory(stage: str, copies: int, recipe: Recipe, base: Artifact, machine: Machine) -> float | None:
    """Return bytes per process."""
    shapes = shapes_of(recipe, base)
    if stage == stages.TRAIN and shapes:
        return training_memory(shapes, load_of(recipe.train, machine)).total()
    weights = parameters_of(recipe, base)
    if weights is None or not copies:
        return None
    vocabulary: float = shapes.vocabulary if shapes else float(str(base.metadata.get("vocabulary", 50_000)))
    return float(4 * weights * copies) + (16 if copies > 2 else 8) * machine.micro_batch_tokens * vocabulary


def disk_bytes(recipe: Recipe, weights: float | None) -> float:
    """Return about how many bytes the artifacts of `recipe` take, a checkpoint while training included."""
    corpus = recipe.generate.rows * recipe.generate.length
    per_token = recipe.generate.top_logprobs + recipe.generate.stored_tail()
    stored = 4 * per_token * corpus  # an id and a log-probability, two bytes each
    return 16 * (recipe.probe.rows * recipe.probe.length + corpus) + stored + 20 * (weights or 0)
