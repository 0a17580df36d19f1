"""The memory plan of a training says what fits, and agrees with what small trainings are measured to need."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.gpu_memory import USABLE, ways_to_train
from cfsd.estimate import CHECKED, KNOWN_SHAPES, PROCESS_BYTES, divergence_memory, estimate, job_of
from cfsd.evaluate.benchmark import Benchmark
from cfsd.machine import Machine
from cfsd.model.folder import count_parameters
from cfsd.recipe import Recipe
from cfsd.store.artifact import Artifact
from cfsd.train.memory import Load, Memory, Shapes, load_of, training_memory
from cfsd.train.spec import TrainSpec
from tests.conftest import ROOT, write_rows

LLAMA_1B = Shapes(2048, 16, 8192, heads=32, kv_heads=8, vocabulary=128_256, tied=True)
LLAMA_8B = Shapes(4096, 32, 14_336, heads=32, kv_heads=8, vocabulary=128_256)
FACTOR = 1.35  # measured: 0.83 to 1.06

DEEP = Shapes(256, 6, 1024, heads=4, kv_heads=2, vocabulary=2048, tied=True)
WIDE = Shapes(512, 3, 1408, heads=8, kv_heads=8, vocabulary=8192)


def case(shapes: Shapes, tokens: int, *, checkpointing: bool = False, **spec: Any) -> dict[str, Any]:
    return {"shapes": shapes._asdict(), "tokens": tokens, "checkpointing": checkpointing, "spec": spec}


MORE = [
    case(WIDE, 256),
    case(WIDE, 256, checkpointing=True),
    case(WIDE, 512, methods={"lora": {"rank": 8}}),
    case(WIDE, 512, methods={"l2": {"weight": 0.1}}),
    case(DEEP, 1536, precision="bfloat16"),
    case(WIDE, 1536),
]


def measured(folder: Path, cases: list[dict[str, Any]]) -> list[int]:
    command = [sys.executable, "-m", "tests.train.training_memory", str(folder), json.dumps(cases)]
    # one path of bfloat16 on all processors: where they compute in it themselves, oneDNN lays tensors out a second time
    env = os.environ | {"OMP_NUM_THREADS": "1", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert run.returncode == 0, run.stderr
    print(run.stdout[-3000:])
    return [json.loads(line)["bytes"] for line in run.stdout.splitlines() if line.startswith('{"case"')]


def planned(case: dict[str, Any]) -> float:
    machine = Machine(
        device="cpu", micro_batch_tokens=case["tokens"], gradient_checkpointing=case["checkpointing"]
    )  # fmt: skip
    load = load_of(TrainSpec.model_validate({"seed": 0} | case["spec"]), machine)
    return training_memory(Shapes(**case["shapes"]), load).total()


def check(folder: Path, cases: list[dict[str, Any]]) -> list[int]:
    found = measured(folder, cases)
    rates = [planned(case) / taken for case, taken in zip(cases, found, strict=True)]
    print([f"{taken / 1e6:.0f} MB, planned {rate:.2f}" for taken, rate in zip(found, rates, strict=True)])
    assert all(1 / FACTOR < rate < FACTOR for rate in rates), rates
    return found


def test_real_trainings_need_what_is_planned(tmp_path: Path) -> None:
    whole, checkpointed = check(tmp_path, [case(DEEP, 768), case(DEEP, 768, checkpointing=True)])
    assert checkpointed < whole


@pytest.mark.slow
def test_methods_precision_and_longer_micro_batches_are_planned(tmp_path: Path) -> None:
    check(tmp_path, MORE)


def test_parameters_are_counted_as_published() -> None:
    assert LLAMA_1B.parameters() == 1_235_814_400
    assert LLAMA_8B.parameters() == 8_030_261_248


def fits(memory: Memory) -> bool:
    return memory.total() <= USABLE * 80e9


def test_what_fits_on_gpus_of_80_gigabytes() -> None:
    assert all(fits(memory) for gpus in (1, 8) for memory in ways_to_train(LLAMA_1B, gpus).values())
    alone, eight = ways_to_train(LLAMA_8B, 1), ways_to_train(LLAMA_8B, 8)
    assert {name for name, memory in alone.items() if fits(memory)} == {
        "LoRA 16, one GPU",
        "LoRA 16, one GPU, checkpointing",
    }
    assert {name for name, memory in eight.items() if not fits(memory)} == {
        "all weights, replicate", "all weights, replicate, checkpointing",
    }  # fmt: skip
    assert alone["all weights, one GPU"].total() > 16 * LLAMA_8B.parameters()


def test_shards_divide_weights_gradients_and_moments_and_nothing_else() -> None:
    whole, parts = (training_memory(LLAMA_8B, Load(processes=8, sharded=sharded)) for sharded in (False, True))
    assert (whole.weights / parts.weights, whole.moments / parts.moments) == (8, 8)
    assert whole.gradients / parts.gradients == 16  # DDP's buckets are a second copy
    assert parts.logits == whole.logits
    assert parts.activations > whole.activations  # gathered blocks


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (Load(anchor_copies=1), "anchors"), (Load(live_base=True), "live_base"), (Load(live_base=True), "logits"),
        (Load(micro_batch_tokens=2048), "activations"), (Load(chunk=512), "logits"),
    ],
)  # fmt: skip
def test_what_is_asked_for_is_counted(change: Load, part: str) -> None:
    assert getattr(training_memory(LLAMA_1B, change), part) > getattr(training_memory(LLAMA_1B, Load()), part)


def test_the_plan_of_a_recipe_reads_the_models_own_sizes(model_folder: Path, home: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    recipe = Recipe.model_validate({"name": "x", "base": str(model_folder), "target": {"path": str(rows)}})
    unknown = Artifact(kind="model", key="", content="")
    machine = Machine(device="cpu", micro_batch_tokens=512)
    config = Shapes.of_config(json.loads((model_folder / "config.json").read_text()))
    assert config
    assert recipe.base.path and config.parameters() == count_parameters(model_folder)

    def memory(recipe: Recipe) -> float | None:
        return estimate("train", (), job_of(recipe, unknown, unknown, machine), 1e11).memory

    planned = memory(recipe)
    assert planned == training_memory(config, load_of(recipe.train, machine)).total() + PROCESS_BYTES
    anchored = recipe.model_copy(
        update={"train": TrainSpec.model_validate({"methods": {"ewc": {"weight": 1}}, "seed": 0})}
    )
    more = memory(anchored)
    assert planned and more == planned + 8 * config.parameters()


def test_the_command_says_what_fits(tmp_path: Path) -> None:
    config = {
        "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "model_type": "llama",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = [sys.executable, "-m", "benchmarks.gpu_memory", str(tmp_path / "config.json"), "--gpus", "8"]
    said = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=True).stdout.splitlines()
    assert said[0] == "8.03 billion weights, 8 x 80 GB"
    assert any("all weights, shard " in line and line.endswith("  fits") for line in said)
    assert any("all weights, replicate " in line and "does not fit" in line for line in said)


WIDE_VOCABULARY = """
import json, psutil, torch
from transformers import LlamaConfig, LlamaForCausalLM
from cfsd.evaluate.divergence import BasePredictions
from cfsd.machine import peak_memory
before = psutil.Process().memory_info().rss  # torch for CUDA takes half a gigabyte more than torch for CPUs
config = LlamaConfig(**json.load(open("config.json")))
base, tuned = (LlamaForCausalLM(config).eval() for _ in range(2))
rows = torch.randint(0, config.vocab_size, (8, 64)).tolist()
known = BasePredictions(base, rows, 512)
known.keep()
known.divergences(tuned)
print(peak_memory() - before)
"""


def test_a_divergence_over_a_wide_vocabulary_needs_what_is_planned(tmp_path: Path) -> None:
    config = {
        "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 150_000, "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-c", WIDE_VOCABULARY]
    run = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert run.returncode == 0, run.stderr
    shapes = Shapes.of_config(config)
    assert shapes
    planned = divergence_memory(shapes.parameters(), shapes.vocabulary) - PROCESS_BYTES
    print(f"{int(run.stdout) / 1e9:.2f} GB, planned {planned / 1e9:.2f}")
    assert 1 / FACTOR < planned / int(run.stdout) < FACTOR


EXPERTS: dict[str, dict[str, Any]] = {  # the sizes of Qwen3-30B-A3B, Mixtral 8x7B, OLMoE-1B-7B and GPT-OSS-20B
    "qwen3_moe": {
        "hidden_size": 2048, "num_hidden_layers": 48, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_experts": 128, "num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
    },
    "mixtral": {
        "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336, "num_local_experts": 8,
        "num_experts_per_tok": 2, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
    },
    "olmoe": {
        "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 1024, "num_experts": 64,
        "num_experts_per_tok": 8, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 50304,
    },
    "gpt_oss": {
        "hidden_size": 2880, "num_hidden_layers": 24, "intermediate_size": 2880, "num_local_experts": 32,
        "num_experts_per_tok": 4, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
        "vocab_size": 201088,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", EXPERTS)
def test_mixtures_of_experts_are_planned_with_all_of_their_weights(kind: str) -> None:
    """They were counted as dense models of one expert's size: a plan said that a tenth of the memory is enough."""
    config = AutoConfig.for_model(kind, **EXPERTS[kind])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    real = model.num_parameters()
    linear = sum(
        layer.weight.numel()
        for layer in model.modules()
        if isinstance(layer, torch.nn.Linear) and layer is not model.get_output_embeddings()
    )
    shapes = Shapes.of_config(config.to_dict())
    assert shapes and shapes.parameters() == pytest.approx(real, rel=0.01)
    quantised = TrainSpec.model_validate({"seed": 0, "methods": {"lora": {"rank": 16, "quantise": "nf4"}}})
    load = load_of(quantised, Machine(device="cpu"))
    assert training_memory(shapes, load).weights > 0.95 * 4 * (real - linear)
    assert 2 * linear < shapes.passed() < real / 2


@pytest.mark.parametrize(("room", "copies"), [(True, 1), (False, 0)])
def test_sampling_is_planned_with_the_copy_of_weights_that_it_lays_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: bool, copies: int
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    recipe = Recipe.model_validate({"name": "packed", "base": "smollm2", "target": {"path": str(rows)}})
    unknown = Artifact(kind="model", key="", content="")
    monkeypatch.setattr("cfsd.estimate.room_for_a_copy", lambda size: room)
    job = job_of(recipe, unknown, unknown, Machine(device="cpu"))
    scored = estimate("weigh", (), job, 1e11).memory  # one copy as well, and as many logits
    weights = KNOWN_SHAPES["smollm2"].parameters()
    planned = estimate("probe", (recipe.probe,), job, 1e11).memory
    assert planned and scored and planned - scored == 4 * weights * copies
    assert estimate("evaluate", (Benchmark(name="questions"),), job, 1e11).memory == planned
    assert estimate("evaluate", (Benchmark(name="facts"),), job, 1e11).memory == scored


def test_written_answers_are_planned_at_half_their_limit_and_the_rate_of_many_rows(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    recipe = Recipe.model_validate({"name": "asked", "base": "smollm2", "target": {"path": str(rows)}})
    unknown = Artifact(kind="model", key="", content="")
    job = job_of(recipe, unknown, unknown, Machine(device="cpu"))
    planned = estimate("evaluate", (Benchmark(name="instructions"),), job, 1.08e11)  # of one core, as measured then
    assert planned.seconds and 40 / CHECKED < planned.seconds < 40 * CHECKED  # measured: 40 s of one core
    assert planned.tokens and 300 * 32 < planned.tokens < 300 * (32 + 30)
