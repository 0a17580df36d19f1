"""What a stage will cost: tokens, memory and time, from settings and the sizes of what it reads.

FLOPs per token: 2 x parameters forward, 6 x with the backward pass (Kaplan et al. 2020, arXiv:2001.08361, 2.1), at the
rate of a matrix product that is measured here and now. What else takes time was measured on two CPU cores; the plan's
times of the demo's stages are within CHECKED of those that they took there (tests/test_estimate.py). On GPUs nothing
was compared.
"""

import json
import math
import time
from collections.abc import Callable, Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from cfsd import stages
from cfsd.data.target import Target
from cfsd.data.target_size import TargetSize, size_of_target
from cfsd.evaluate.benchmark import Benchmark
from cfsd.evaluate.benchmark_size import GENERATING, BenchmarkSize, size_of_benchmark
from cfsd.evaluate.show import Show
from cfsd.evaluate.spec import BLOCK, CHUNK
from cfsd.evaluate.text import Text
from cfsd.generate.prompts import Prompts
from cfsd.generate.spec import GenerateSpec, ProbeSpec
from cfsd.machine import Machine, home, room_for_a_copy, room_for_two
from cfsd.merge.spec import MergeSpec
from cfsd.model.folder import count_parameters
from cfsd.model.token_counts import Count, token_count
from cfsd.recipe import Recipe
from cfsd.store.artifact import Artifact, Store
from cfsd.train.memory import Shapes, load_of, training_memory

GIB = 2**30
KEPT_BYTES = 4  # of each weight of a model that was trained or merged, in float32
WEIGHT_BYTES = {stages.FETCH: 4, stages.TRAIN: 12 + KEPT_BYTES}  # while it trains, a checkpoint with AdamW's moments
OF_DISK = (*WEIGHT_BYTES, stages.PROBE, stages.GENERATE)  # the stages that take most of it
CHECKED = 1.5
CUDA_RATE = 1e14  # FLOPs a second of one large GPU in bfloat16: a guess
REACHED = 0.85  # of a matrix product's rate, by a pass over many tokens
DECODED = 0.8  # where each token waits for the one before
IN_BFLOAT16 = 0.7  # of a training step's time that goes to products, which some CPUs make faster in bfloat16
TAIL_SECONDS = 3e-6  # of each sample of the tail that is stored with a token
BYTES_PER_SECOND = 1.2e9  # weights that are read from the disk, or written
CHECKPOINT = 3  # times the weights: they and AdamW's moments
PROCESS_SECONDS = 5.0  # until a fresh process trains
SCORING_SECONDS = 0.2  # of a benchmark, whatever its size
DEQUANTISING_SECONDS = 1.2e-7  # of each weight of the packaged SmolLM2
COMMAND_SECONDS, STAGE_SECONDS = 15.0, 0.6  # of a command, and of each stage that runs, for what is recorded of it
PROCESS_BYTES = 0.5 * GIB  # of Python, torch and transformers
KNOWN_SHAPES = {
    "smollm2": Shapes(576, 30, 1536, heads=9, kv_heads=3, vocabulary=49_152, tied=True),
    "tiny": Shapes(64, 4, 128, heads=2, kv_heads=2, vocabulary=99),
    # of the hub, as their config.json has them: the shipped recipes are planned before anything is downloaded
    "allenai/OLMo-1B-hf": Shapes(2048, 16, 8192, heads=16, kv_heads=16, vocabulary=50_304, tied=True),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": Shapes(4096, 32, 14_336, heads=32, kv_heads=8, vocabulary=128_256),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-70B": Shapes(8192, 80, 28_672, heads=64, kv_heads=8, vocabulary=128_256),
    "Qwen/Qwen3-8B": Shapes(4096, 36, 12_288, heads=32, kv_heads=8, vocabulary=151_936, head_size=128),
}
USUAL_LAYERS = 24  # of a model whose shapes are unknown
EVERYDAY = 6  # prompts of ours that are shown
TRIES = 3  # of alpha, until the budget is met: docs/decisions/0015
Metadata = Mapping[str, Any]  # of the target
Inputs = tuple[Any, ...]


class Estimate(NamedTuple):
    """Tokens that pass through the model, bytes of memory, seconds. None: unknown until earlier stages have run."""

    tokens: float | None
    memory: float | None
    seconds: float | None


class Work(NamedTuple):
    """What a stage does with the model, as far as it takes time."""

    tokens: float = 0  # that pass through it
    passes: float = 1  # forward passes of each; a backward pass is two
    calls: float = 0  # of the model, for all of these passes
    decoded: bool = False  # one token after the other
    logits: float = 0  # distributions over the vocabulary that are summed over
    updates: float = 0  # optimizer steps
    moved: float = 0  # copies of the weights that are read or written
    seconds: float = 0  # that depend on nothing


class Job(NamedTuple):
    """What the stages of one recipe share."""

    recipe: Recipe
    base: Artifact
    target: Metadata  # as the stage `target` wrote them, or as they are guessed
    machine: Machine
    tokens_in: Count

    def calls(self, tokens: float) -> float:
        """Return the micro-batches that `tokens` make."""
        return math.ceil(tokens / self.machine.micro_batch_tokens)

    def held_out(self) -> float:
        """Return the tokens of the held-out rows that are measured. Raises KeyError if they are unknown."""
        rows, most = self.target["held_out_rows"], self.recipe.evaluate.held_out_rows
        return float(self.target["held_out_tokens"] * min(1, (most or rows) / max(rows, 1)))


def job_of(recipe: Recipe, base: Artifact, target: Artifact, machine: Machine) -> Job:
    """Return what is known of the stages of `recipe`; what its target will hold is guessed from its first rows."""
    count = token_count(recipe.base.kind, _folder(recipe, base))
    return Job(recipe, base, target.metadata if target.content else _guessed(recipe, count), machine, count)


def _guessed(recipe: Recipe, count: Count) -> Metadata:
    """Return the metadata that the stage `target` is going to write; empty if nothing is known."""
    if (size := _target_size(recipe.target.model_dump_json(), count)) is None:
        return {}
    held_out = size.rows if recipe.target.measure_only else min(recipe.target.held_out, size.rows)
    train = size.rows - held_out
    return {
        "train_rows": train,
        "train_tokens": train * size.tokens,
        "held_out_rows": held_out,
        "held_out_tokens": held_out * size.tokens,
    }


@cache  # of variants, which share their target and benchmarks, each is read once
def _target_size(described: str, count: Count) -> TargetSize | None:
    return size_of_target(Target.model_validate_json(described), count)


@cache
def _benchmark_size(described: str, count: Count) -> BenchmarkSize | None:
    return size_of_benchmark(Benchmark.model_validate_json(described), count)


def _read(job: Job, tokens: float, models: int = 1, logits: float = 0) -> Work:
    """Return the work of passing `tokens` through each of `models`."""
    return Work(models * tokens, calls=models * job.calls(tokens), logits=models * logits, moved=models)


def _sampled(job: Job, inputs: Inputs) -> Work | None:
    spec = next(value for value in inputs if isinstance(value, ProbeSpec | Prompts | GenerateSpec))
    if job.machine.engine == "server":
        return None if spec.rows else Work()
    if isinstance(spec, GenerateSpec) and spec.source == "replay":
        return _read(job, spec.rows * spec.length, logits=spec.rows * spec.length)
    shards = math.ceil(spec.rows / job.machine.sampling_rows)
    tokens = spec.rows * spec.length
    samples = spec.stored_tail() if isinstance(spec, GenerateSpec) else 0
    return Work(
        tokens, calls=shards * spec.length, decoded=True, moved=bool(spec.rows), seconds=tokens * samples * TAIL_SECONDS
    )


def _probe(job: Job, inputs: Inputs) -> Work:
    return _along(job, job.recipe.probe)


def _chat(job: Job, inputs: Inputs) -> Work:
    probe = job.recipe.probe
    return _along(job, next((probe.of(mode) for mode in probe.modes if mode.name == stages.CHAT), probe))


def _along(job: Job, sample: ProbeSpec | Prompts) -> Work:
    """Return the work of a divergence: both models read the sample."""
    tokens = sample.rows * sample.length
    return _read(job, tokens, 2, tokens)


def _answers(job: Job, inputs: Inputs) -> Work:
    sets = job.recipe.probe.own_prompts()  # on average: the stage does not say which set it is
    tokens = sum(prompts.rows * prompts.length for prompts in sets) / max(1, len(sets))
    return _read(job, tokens, 2, tokens)


def _shown(job: Job, inputs: Inputs) -> Work:
    spec = next(value for value in inputs if isinstance(value, Show))
    rows = (spec.rows if spec.path else min(spec.rows, EVERYDAY)) + spec.unprompted + spec.target
    return Work(rows * spec.length, calls=2 * spec.length, decoded=True, moved=1)  # greedy and sampled ones apart


def _budget(job: Job, inputs: Inputs) -> Work:
    (spec,) = (value for value in inputs if isinstance(value, MergeSpec))
    tokens = (
        job.recipe.probe.rows * job.recipe.probe.length * (len(spec.budget) if isinstance(spec.budget, dict) else 1)
    )
    work = _read(job, tokens, 2, tokens)
    passes = (1 + TRIES) / 2  # of both models: the base reads the rows once
    return work._replace(passes=passes, calls=passes * work.calls, logits=TRIES * work.logits, moved=2 + TRIES)


def _fisher(job: Job, inputs: Inputs) -> Work:
    needed = job.recipe.train.methods.estimate()
    rows = needed.rows if needed else 0
    return Work(rows * job.recipe.generate.length, passes=3, calls=3 * rows, moved=2)


def _rewritten(job: Job, inputs: Inputs) -> Work:
    rows, tokens = _trained_rows(job)  # read with its response before it, and said again
    steps = math.ceil(rows / job.machine.sampling_rows) * 2 * tokens / max(rows, 1)
    return Work(3 * tokens, calls=steps, decoded=True, moved=1)


def _trained_rows(job: Job) -> tuple[float, float]:
    """Return the target rows that are trained on, and their tokens."""
    rows, tokens = job.target["train_rows"], job.target["train_tokens"]
    taken = min(rows, job.recipe.select.target_rows or rows)
    return taken, tokens * taken / max(rows, 1)


def _training(job: Job, inputs: Inputs) -> Work:
    recipe, (rows, tokens) = job.recipe, _trained_rows(job)
    steps = recipe.train.epochs * math.ceil(rows / recipe.mix.target_rows)
    rehearses = recipe.generate.rows and recipe.train.rehearsal.weight
    rehearsed = recipe.mix.rehearsal_tokens if rehearses else 0
    targets = recipe.train.epochs * tokens
    passes = (2 if recipe.train.methods.adapter() else 3) + job.machine.gradient_checkpointing
    passed = passes * (targets + steps * rehearsed)
    held = recipe.train.methods.divergence()
    passed += steps * rehearsed * recipe.train.rehearsal.needs_base() + _watching(job, steps)
    passed += targets if held and not held.stored else 0
    calls = steps * passes * (job.calls(targets / max(steps, 1)) + job.calls(rehearsed))
    all_tokens = max(targets + steps * rehearsed, 1)
    updates = 0 if recipe.train.methods.adapter() else steps
    saved = 0 if recipe.train.methods.adapter() else CHECKPOINT * (steps // job.machine.checkpoint_steps)
    return Work(all_tokens, passed / all_tokens, calls, updates=updates, moved=2 + saved, seconds=PROCESS_SECONDS)


def _rows_of_a_step(recipe: Recipe) -> int:
    """Return how many rows a step trains on, as if no row of the corpus ended early."""
    rehearses = recipe.generate.rows and recipe.train.rehearsal.weight
    rehearsed = math.ceil(recipe.mix.rehearsal_tokens / recipe.generate.length) if rehearses else 0
    return recipe.mix.target_rows + rehearsed


def _watching(job: Job, steps: float) -> float:
    """Return the tokens that pass through the model to watch its training."""
    watch = job.recipe.train.watch
    if not watch.every:
        return 0
    times, rows = steps // watch.every + 2, job.target["held_out_rows"]
    benchmarks = [benchmark for benchmark in job.recipe.evaluate.benchmarks if benchmark.name in watch.benchmarks]
    sizes = [size for benchmark in benchmarks if (size := _benchmark_size(benchmark.model_dump_json(), job.tokens_in))]
    once = watch.rows * job.recipe.probe.length + job.target["held_out_tokens"] * min(1, watch.held_out_rows / rows)
    return float(times * (once + sum(size.tokens() for size in sizes)))


def _scored(job: Job, inputs: Inputs) -> Work | None:
    benchmark = next(value for value in inputs if isinstance(value, Benchmark))
    size = _benchmark_size(benchmark.model_dump_json(), job.tokens_in)
    return _benchmark(job, size) if size else None


def _benchmark(job: Job, size: BenchmarkSize) -> Work:
    if not size.written:
        return _read(job, size.tokens(), logits=size.tokens())._replace(seconds=SCORING_SECONDS)
    rows = max(1, GENERATING * job.machine.micro_batch_tokens // (size.read + size.written))
    calls = math.ceil(size.documents / rows) * size.written  # one row that reaches the limit is enough
    return Work(size.tokens(), calls=calls, moved=1, seconds=SCORING_SECONDS)


def _text(job: Job, inputs: Inputs) -> Work:
    text = next(value for value in inputs if isinstance(value, Text))
    tokens = sum(map(job.tokens_in, text.documents()))
    return _read(job, tokens, logits=tokens)


def _fetched(job: Job, inputs: Inputs) -> Work | None:
    kind, weights = job.recipe.base.kind, parameters_of(job.recipe, job.base)
    if kind == "hub" or weights is None:
        return None
    return Work(moved=2, seconds=1.5 + (DEQUANTISING_SECONDS * weights if kind == "smollm2" else 0))


STAGES: dict[str, Callable[[Job, Inputs], Work | None]] = {
    stages.FETCH: _fetched,
    stages.PROBE: _sampled,
    stages.CHAT: _sampled,
    stages.PROMPTS: _sampled,
    stages.GENERATE: _sampled,
    stages.WEIGH: lambda job, inputs: _read(job, _trained_rows(job)[1]),
    stages.ALONG: lambda job, inputs: _read(job, _trained_rows(job)[1], logits=_trained_rows(job)[1]),
    stages.FISHER: _fisher,
    stages.REWRITE: _rewritten,
    stages.TRAIN: _training,
    stages.BUDGET: _budget,
    stages.MERGE: lambda job, inputs: Work(moved=4),
    stages.EVALUATE: _scored,
    stages.EVALUATE_TEXT: _text,
    stages.EVALUATE_TARGET: lambda job, inputs: _read(job, job.held_out()),
    stages.EVALUATE_TARGET_DIVERGENCE: lambda job, inputs: _read(job, job.held_out(), 2),
    stages.EVALUATE_PROBE: _probe,
    stages.EVALUATE_CHAT: _chat,
    stages.EVALUATE_PROMPTS: _answers,
    stages.SHOW: _shown,
} | {
    name: lambda job, inputs: Work() for name in (stages.TARGET, stages.FILTER, stages.SELECT, stages.MIX, stages.CHECK)
}
DIVERGENCES = (
    stages.BUDGET, stages.EVALUATE_TARGET_DIVERGENCE, stages.EVALUATE_PROBE, stages.EVALUATE_CHAT,
    stages.EVALUATE_PROMPTS,
)  # fmt: skip
COPIES = {  # of the weights, with gradients and moments; of training `cfsd.train.memory` knows more
    **dict.fromkeys(DIVERGENCES, 1), stages.FISHER: 3, stages.BUDGET: 3, stages.MERGE: 2,
    **dict.fromkeys((*stages.SAMPLING, stages.EMBED, stages.WEIGH, stages.CHECK), 1),
    **dict.fromkeys((stages.ALONG, stages.REWRITE), 1),
    **dict.fromkeys((stages.EVALUATE, stages.EVALUATE_TEXT, stages.EVALUATE_TARGET, stages.SHOW), 1),
}  # fmt: skip
IN_FLOAT32 = (stages.FISHER, stages.BUDGET, stages.MERGE)  # also on CUDA, where models are measured in bfloat16


def parameters_of(recipe: Recipe, base: Artifact) -> float | None:
    """Return the number of weights, None if it is unknown until the model is fetched."""
    if recipe.base.kind == "folder" and recipe.base.path:
        return float(count_parameters(Path(recipe.base.path)))
    shapes = KNOWN_SHAPES.get(recipe.base.name or recipe.base.kind)
    parameters: Any = base.metadata.get("parameters") or (shapes and shapes.parameters())
    return float(parameters) if parameters else None


def shapes_of(recipe: Recipe, base: Artifact) -> Shapes | None:
    """Return the model's sizes, from its config.json if it is on this machine."""
    folder = _folder(recipe, base)
    config = folder / "config.json" if folder else None
    if config and config.exists():
        return Shapes.of_config(json.loads(config.read_text()))
    return KNOWN_SHAPES.get(recipe.base.name or recipe.base.kind)


def _folder(recipe: Recipe, base: Artifact) -> Path | None:
    """Return where the model is, if it is on this machine."""
    if recipe.base.path:
        return Path(recipe.base.path)
    return Store(home()).path(base, weights=False) if base.content else None


def rate_of(machine: Machine) -> float:
    """Return the FLOPs a second of large products: on CPUs measured, in a fifth of a second."""
    if machine.resolved_device() == "cuda":
        return CUDA_RATE
    return _measured_rate(machine.resolved_threads(), "float32")


def _bfloat16_gain(machine: Machine) -> float:
    """Return how much faster than in float32 a training step in bfloat16 is on this machine's CPUs; slower: below 1."""
    in_float32, in_bfloat16 = (_measured_rate(machine.resolved_threads(), name) for name in ("float32", "bfloat16"))
    return 1 / (1 - IN_BFLOAT16 + IN_BFLOAT16 * in_float32 / in_bfloat16)


@cache
def _measured_rate(threads: int, dtype: str, size: int = 1024, seconds: float = 0.2) -> float:
    import torch

    before, best = torch.get_num_threads(), math.inf
    torch.set_num_threads(threads)
    one, other, out = (torch.randn(size, size).to(getattr(torch, dtype)) for _ in range(3))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or best == math.inf:  # once at least, on however busy a machine
        started = time.perf_counter()
        torch.mm(one, other.t(), out=out)
        best = min(best, time.perf_counter() - started)
    torch.set_num_threads(before)
    return 2 * size**3 / best


def estimate(stage: str, inputs: Inputs, job: Job, rate: float) -> Estimate:
    """Return what `stage` costs with `inputs`, on a machine of `rate` FLOPs a second."""
    memory, weights = _memory(stage, inputs, job), parameters_of(job.recipe, job.base)
    try:
        work = STAGES[stage](job, inputs)
    except KeyError:  # a stage that is not known here, or a target of which nothing is known
        work = None
    if work is None:
        return Estimate(None, memory, None)
    return Estimate(work.tokens or None, memory, None if weights is None else _seconds(stage, work, job, weights, rate))


class Pace(NamedTuple):
    """Seconds beside those of large products, and how many processes share them."""

    call: float  # of each layer at each call of a model, however few tokens
    update: float  # of each trained weight at each step: AdamW
    logit: float  # of each entry of a distribution that is summed over
    processes: int = 1
    shards: int = 1  # of the weights that are updated


ON_CPU = Pace(0.75e-3, 1.5e-9, 5e-9)  # fitted to runs
# guesses: 20 launches of 10 us; 28 bytes of a weight, and of an entry, at 1.4e12 bytes a second
ON_CUDA = Pace(0.2e-3, 2e-11, 2e-11)


def _pace(stage: str, machine: Machine, rows_of_a_step: int) -> Pace:
    """Return the pace of a stage, whose work GPUs divide where it is training or sampling: no row among several."""
    if machine.resolved_device() != "cuda":
        return ON_CPU
    if stage == stages.TRAIN:
        held = machine.resolved_training_processes()
        shards = held if machine.resolved_sharding() == "shard" else 1
        return ON_CUDA._replace(processes=min(held, rows_of_a_step), shards=shards)
    return ON_CUDA._replace(processes=machine.resolved_processes() if stage in stages.SAMPLING else 1)


def _seconds(stage: str, work: Work, job: Job, weights: float, rate: float) -> float:
    shapes, machine = shapes_of(job.recipe, job.base), job.machine
    pace = _pace(stage, machine, _rows_of_a_step(job.recipe))
    if machine.resolved_device() != "cuda" and stage == stages.TRAIN and job.recipe.train.in_bfloat16(machine):
        rate *= _bfloat16_gain(machine)
    share = DECODED if work.decoded else REACHED
    vocabulary, layers = (shapes.vocabulary, shapes.layers) if shapes else (50_000, USUAL_LAYERS)
    passed = shapes.passed() if shapes and shapes.experts else weights
    return (
        work.passes * work.tokens * 2 * passed / (rate * share * pace.processes)
        + work.calls * layers * pace.call / pace.processes
        + work.updates * weights * pace.update / pace.shards
        + work.logits * vocabulary * pace.logit
        + work.moved * 4 * weights / BYTES_PER_SECOND
        + work.seconds
    )


def _memory(stage: str, inputs: Inputs, job: Job) -> float | None:
    """Return bytes per process."""
    shapes, machine, copies = shapes_of(job.recipe, job.base), job.machine, COPIES.get(stage)
    if stage == stages.TRAIN and shapes:
        process = 0 if machine.resolved_device() == "cuda" else PROCESS_BYTES
        return training_memory(shapes, load_of(job.recipe.train, machine)).total() + process
    weights = parameters_of(job.recipe, job.base)
    if weights is None or not copies:
        return None
    cuda = machine.resolved_device() == "cuda"
    held = (2 if machine.halves() and stage not in IN_FLOAT32 else 4) * weights
    vocabulary = shapes.vocabulary if shapes else int(str(job.base.metadata.get("vocabulary", 50_000)))
    if stage in DIVERGENCES:
        both = stage != stages.BUDGET and not cuda and room_for_two(held, "cpu")
        head = 4 * vocabulary * (shapes.width if shapes else 0)  # of a base that was let go
        return divergence_memory(0, vocabulary) + held * (copies + both) + head
    writes = stage in stages.SAMPLING or any(isinstance(value, Benchmark) and value.is_written() for value in inputs)
    if writes and not cuda and room_for_a_copy(held):
        copies += 1  # laid out for the products of writing: cfsd.generate.packed_weights
    return PROCESS_BYTES + held * copies + 4 * 2 * machine.micro_batch_tokens * vocabulary


def divergence_memory(weights: float, vocabulary: int) -> float:
    """Return the bytes of a process that compares two models, the interpreter included.

    Logits of both for a block of tokens, and what the sums over a chunk of them, and the one before, are made of.
    """
    return PROCESS_BYTES + 4 * (2 * weights + (2 * BLOCK + 10 * CHUNK) * vocabulary)


def disk_bytes(recipe: Recipe, weights: float | None, left: Collection[str] = OF_DISK) -> float:
    """Return about how many bytes the stages of `recipe` that are `left` write, checkpoints while training included."""
    per_token = recipe.generate.top_logprobs + recipe.generate.stored_tail()
    rows_of = {  # tokens, and the bytes of each: an id and a log-probability, two bytes each, beside the row's columns
        stages.PROBE: (recipe.probe.rows * recipe.probe.length, 16),
        stages.GENERATE: (recipe.generate.rows * recipe.generate.length, 16 + 4 * per_token),
    }
    sampled = sum(tokens * each for stage, (tokens, each) in rows_of.items() if stage in left)
    each = WEIGHT_BYTES | ({stages.TRAIN: KEPT_BYTES} if recipe.train.methods.lora.is_on() else {})
    of_a_weight = sum(number for stage, number in each.items() if stage in left)
    only_merged = KEPT_BYTES if stages.MERGE in left and stages.TRAIN not in left else 0
    return sampled + (of_a_weight + only_merged) * (weights or 0)
