"""Adapters damaged at random: one clear message, or a model that computes what PEFT does with the two."""

import json
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cfsd.errors import BadInput
from cfsd.model.adapter import Adapter
from cfsd.model.adapter_merging import merge
from tests.model.test_adapter import base_of, logits, lora, trained

VALUES = [None, -1, 0, 1, 3, 2.5, True, "", "x", [], [1], {}, {"a": 1}, "all-linear", ["q_proj"], "pissa", "olora"]
Damage = Callable[[Path, random.Random], None]


def value_changed(folder: Path, rng: random.Random) -> None:
    file = folder / "adapter_config.json"
    content = json.loads(file.read_text())
    content[rng.choice(sorted(content))] = rng.choice(VALUES)
    file.write_text(json.dumps(content))


def tensor_changed(folder: Path, rng: random.Random) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = rng.choice(sorted(tensors))
    tensor = tensors.pop(name)
    changed = {name.replace("layers.1", "layers.0"): tensor, name.replace("lora_A", "lora_B"): tensor, name: tensor.T}
    save_file({k: v.contiguous() for k, v in (tensors | dict([rng.choice([*changed.items()])])).items()}, file)


def cut(folder: Path, rng: random.Random) -> None:
    file = folder / rng.choice(["adapter_config.json", "adapter_model.safetensors"])
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content))])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("adapters")
    base = base_of(place / "base")
    return base, trained(base, place / "adapter", lora(target_modules=["q_proj", "lm_head"]))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=st.sampled_from([value_changed, value_changed, tensor_changed, cut]), seed=st.integers(0, 2**32))
def test_a_damaged_adapter_is_refused_or_computes_what_peft_does(
    folders: tuple[Path, Path], damage: Damage, seed: int
) -> None:
    base, whole = folders
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings(action="ignore"):
        adapter, merged = Path(shutil.copytree(whole, Path(place) / "adapter")), Path(place) / "merged"
        damage(adapter, random.Random(seed))
        try:
            merge(base, Adapter(path=str(adapter)), merged)
        except BadInput as error:
            assert len(str(error)) < 2000 and "\n" not in str(error)
            return
        both = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))
        torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(merged)), both, rtol=1e-4, atol=1e-4)
