"""Model folders damaged at random: one clear message, or a model that loads and predicts the same finite numbers."""

import json
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cfsd.errors import BadInput
from cfsd.model.causal import check_predictions
from cfsd.model.checkpoint import Checkpoint
from cfsd.model.fetching import fetch
from cfsd.model.loading import load_model, load_tokenization
from cfsd.store.artifact import Draft, Store
from tests.conftest import save_model
from tests.model.folders import change_json, in_shards

Damage = Callable[[Path, Path, random.Random], None]
VALUES = [None, -1, 0, 1, 3, 2.5, 1e40, True, "", "x", [], [1], {}, {"a": 1}, 10**6, "\x00", [None], ["llama"]]


def file_of(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(path for path in folder.iterdir() if path.is_file()))


def dropped(folder: Path, other: Path, rng: random.Random) -> None:
    file_of(folder, rng).unlink()


def cut(folder: Path, other: Path, rng: random.Random) -> None:
    file = file_of(folder, rng)
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content))] if content else b"")


def swapped(folder: Path, other: Path, rng: random.Random) -> None:
    file = file_of(folder, rng)
    if (other / file.name).exists():
        shutil.copy(other / file.name, file)


def bytes_changed(folder: Path, other: Path, rng: random.Random) -> None:
    file = file_of(folder, rng)
    content = bytearray(file.read_bytes() or b" ")
    for _ in range(rng.choice([1, 3, 50])):
        content[rng.randrange(len(content))] = rng.randrange(256)
    file.write_bytes(content)


def value_changed(folder: Path, other: Path, rng: random.Random) -> None:
    file = folder / rng.choice(["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
    try:
        content = json.loads(file.read_text())
        place: Any = content
        while isinstance(inner := place[name := rng.choice(sorted(place))], dict) and inner and rng.random() < 0.7:
            place = inner
        place[name] = rng.choice(VALUES)
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return  # an earlier damage
    file.write_text(json.dumps(content))


def field_added(folder: Path, other: Path, rng: random.Random) -> None:
    names = ["text_config", "auto_map", "quantization_config", "layer_types", "rope_scaling", "architectures",
             "num_local_experts", "tie_word_embeddings", "eos_token_id", "dtype", "sliding_window"]  # fmt: skip
    try:
        change_json(folder / "config.json", **{rng.choice(names): rng.choice(VALUES)})
    except (OSError, ValueError, TypeError):
        return


def divided(folder: Path, other: Path, rng: random.Random) -> None:
    if (folder / "model.safetensors").exists():
        try:
            in_shards(folder)
        except Exception:  # damaged before
            return


DAMAGES: list[Damage] = [dropped, cut, swapped, bytes_changed, value_changed, value_changed, field_added, divided]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("models")
    return [save_model(place / family, family=family, seed=1) for family in ("llama", "qwen2", "gpt2")]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damages=st.lists(st.sampled_from(DAMAGES), min_size=1, max_size=3), seed=st.integers(0, 2**32))
def test_a_damaged_folder_is_refused_or_works(models: list[Path], damages: list[Damage], seed: int) -> None:
    rng = random.Random(seed)
    mine, other = rng.sample(models, 2)
    with tempfile.TemporaryDirectory() as place:
        folder, made = Path(place) / "model", Path(place) / "made"
        shutil.copytree(mine, folder)
        made.mkdir()
        for damage in damages:
            damage(folder, other, rng)
        checkpoint = Checkpoint(kind="folder", path=str(folder))
        try:
            checkpoint.check()
            fetch(checkpoint, Draft(Store(Path(place) / "data"), made, continued=False))
            first, again = (load_model(made, "cpu").eval() for _ in range(2))
            check_predictions(first, made)
        except BadInput as error:
            assert len(str(error)) < 2000
            assert "\n" not in str(error)
            return
        tokens = load_tokenization(made)
        ids = torch.tensor([[tokens.start, *range(3, 12)]])
        with torch.no_grad():
            logits = [model(input_ids=ids, use_cache=False).logits for model in (first, again)]
        assert torch.isfinite(logits[0]).all()
        assert torch.equal(*logits)
        tokens.tokenizer.encode("abc")
