"""A tiny world: a random two-layer model with a character vocabulary, a data folder of its own, one Prefect server."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
LETTERS = "abcdefghijklmnopqrstuvwxyz =:."


def save_model(folder: Path, *, seed: int = 0, family: str = "llama", bos: bool = True, scale: float = 0.3) -> Path:
    """Write a random model whose law is far from uniform, with its tokenizer; families differ in architecture."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, OlmoConfig, PreTrainedTokenizerFast

    special = ["<bos>", "<eos>"] if bos else ["<eos>"]
    vocabulary = {token: i for i, token in enumerate([*special, *LETTERS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="."))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    raw.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>" if bos else None, eos_token="<eos>", pad_token="<eos>"
    )
    ids: dict[str, Any] = {"eos_token_id": vocabulary["<eos>"], "pad_token_id": vocabulary["<eos>"]}
    config = {"llama": LlamaConfig, "olmo": OlmoConfig}[family](
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128,
        bos_token_id=vocabulary.get("<bos>"), tie_word_embeddings=True, initializer_range=scale, **ids,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = ids["eos_token_id"]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int = 40, seed: int = 0) -> Path:
    """Write prompt/response rows: a word and its reverse."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(3, 6))) for _ in range(count)]
    path.write_text("".join(json.dumps({"prompt": f"{w}=", "response": w[::-1]}) + "\n" for w in words))
    return path


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama-shaped model."""
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder of this test's own."""
    monkeypatch.setenv("CFSD_HOME", str(tmp_path / "data"))
    return tmp_path / "data"
