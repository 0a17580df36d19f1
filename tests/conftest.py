"""A tiny world: a random two-layer model with a character vocabulary, a data folder of its own, one Prefect server."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest

if TYPE_CHECKING:
    from cfsd.store.artifact import Artifact, Store

ROOT = Path(__file__).parent.parent
WORLD = Path(tempfile.mkdtemp(prefix="cfsd-tests-"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Prefect and MLflow read their places when they are imported; the server itself starts when a test needs it.
PORT = _free_port()
os.environ.update(
    CFSD_HOME=str(WORLD / "data"),
    PREFECT_HOME=str(WORLD / "prefect"),
    PREFECT_API_URL=f"http://127.0.0.1:{PORT}/api",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    MLFLOW_TRACKING_URI=f"sqlite:///{WORLD / 'mlflow.db'}",
    DO_NOT_TRACK="1",
    OMP_NUM_THREADS="1",
)
LETTERS = "abcdefghijklmnopqrstuvwxyz =:."


def see_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let this process believe that it has `count` GPUs."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def save_model(folder: Path, *, seed: int = 0, family: str = "llama", bos: bool = True, scale: float = 0.3) -> Path:
    """Write a random model whose law is far from uniform, with its tokenizer; families differ in architecture."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    special = ["<bos>", "<eos>"] if bos else ["<eos>"]
    vocabulary = {token: i for i, token in enumerate([*special, *LETTERS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="."))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    raw.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>" if bos else None, eos_token="<eos>", pad_token="<eos>"
    )
    ids: dict[str, Any] = {"eos_token_id": vocabulary["<eos>"], "pad_token_id": vocabulary["<eos>"]}
    config = _config(
        family, vocab_size=len(vocabulary), bos_token_id=vocabulary.get("<bos>"), initializer_range=scale, **ids
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = ids["eos_token_id"]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _config(family: str, **common: Any) -> Any:
    """Return two layers of width 32 in the shape of `family`."""
    from transformers import Gemma2Config, GPT2Config, LlamaConfig, OlmoConfig, Qwen2Config

    if family == "gpt2":
        return GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=128, **common)
    sizes: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": True,
    }  # fmt: skip
    if family == "gemma2":  # every other layer sees a window of six tokens; scores and logits are capped
        return Gemma2Config(head_dim=8, sliding_window=6, **sizes, **common)
    if family == "qwen2":
        return Qwen2Config(**sizes, **common)
    return {"llama": LlamaConfig, "olmo": OlmoConfig}[family](
        **sizes | {"num_attention_heads": 2}, **common
    )  # fmt: skip


def write_rows(path: Path, count: int = 40, seed: int = 0) -> Path:
    """Write prompt/response rows: a word and its reverse."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(3, 6))) for _ in range(count)]
    path.write_text("".join(json.dumps({"prompt": f"{w}=", "response": w[::-1]}) + "\n" for w in words))
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts a server or runs a command: `make fast` leaves it out, and in `make test` it comes first.

    The longest files come first, so that no worker is left alone with one of them at the end.
    """
    for item in items:
        if {"server", "run"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("processes")
    items.sort(key=lambda item: item.get_closest_marker("processes") is None)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama-shaped model."""
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder of this test's own."""
    monkeypatch.setenv("CFSD_HOME", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def store(home: Path) -> "Store":
    """The store of this test's data folder."""
    from cfsd.store.artifact import Store

    return Store(home)


def fetched(store: "Store", folder: Path, start_token: str | None = None) -> "Artifact":
    """Bring a model folder into the store, as the first stage does."""
    from cfsd.model.checkpoint import Checkpoint
    from cfsd.model.fetching import fetch
    from cfsd.store.artifact import key_of

    checkpoint = Checkpoint(kind="folder", path=str(folder), start_token=start_token)
    key = key_of("fetch", checkpoint)
    return store.make("model", key, lambda draft: fetch(checkpoint, draft))[0]


def fetched_with_nan(store: "Store", folder: Path, position: int) -> "Artifact":
    """Bring a GPT-2 into the store whose embedding of a position is NaN: what was found whole and damaged since."""
    from safetensors.torch import load_file, save_file

    base = fetched(store, save_model(folder, family="gpt2"))
    file = store.path(base) / "model.safetensors"
    weights = load_file(file)
    weights["transformer.wpe.weight"][position] = float("nan")  # beyond what the trials of a loaded model reach
    file.unlink()  # a link to the user's own
    save_file(weights, file, {"format": "pt"})
    return base


@pytest.fixture
def base(store: "Store", model_folder: Path) -> "Artifact":
    """The random Llama-shaped model in the store."""
    return fetched(store, model_folder)


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """A real Prefect server for the whole session; its URL."""
    log = (WORLD / "server.log").open("w")
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(PORT)]
    process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    end = time.monotonic() + 180
    while not _answers(f"http://127.0.0.1:{PORT}/api/health"):
        assert process.poll() is None and time.monotonic() < end, (WORLD / "server.log").read_text()
        time.sleep(0.3)
    yield f"http://127.0.0.1:{PORT}"
    process.terminate()
    process.wait(30)


def _answers(url: str) -> bool:
    try:
        return bool(urlopen(url, timeout=5).status == 200)
    except (URLError, OSError):
        return False


@pytest.fixture(scope="session", autouse=True)
def _leave_nothing() -> Iterator[None]:
    yield
    shutil.rmtree(WORLD, ignore_errors=True)


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(server: str, home: Path) -> Run:
    """Run `python -m flows.<name> ARGS` on this test's data folder, as a user would."""

    def call(flow: str, *words: object, **kwargs: Any) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", f"flows.{flow}", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600, **kwargs)

    return call


@pytest.fixture
def recipe_file(tmp_path: Path, model_folder: Path) -> Path:
    """A user's own case: a model folder, a JSONL target, a ten-line recipe."""
    return write_recipe(tmp_path, model_folder)


def write_recipe(folder: Path, model_folder: Path) -> Path:
    """Write a target and a recipe for it into `folder`; return the recipe's file."""
    rows = write_rows(folder / "rows.jsonl")
    file = folder / "recipe.yaml"
    file.write_text(
        f"""
name: mine
base: {model_folder}
target: {{path: {rows}, held_out: 8}}
probe: {{rows: 32, length: 24}}
generate: {{rows: 32, length: 24}}
mix: {{target_rows: 8, rehearsal_tokens: 64}}
train: {{learning_rate: 1.0e-3, epochs: 2}}
"""
    )
    return file
