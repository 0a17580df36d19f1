"""A folder that is not a whole, usable causal language model is refused by name, before anything runs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel, T5Config

from cfsd.errors import BadInput
from cfsd.model.folder import check_files
from cfsd.model.loading import load_model, load_tokenizer, read_eos_ids
from cfsd.model.special_tokens import check_ids
from cfsd.model.usable import check_weights
from tests.conftest import save_model

Tensors = dict[str, torch.Tensor]


def write_config(folder: Path, **changes: Any) -> None:
    for name in ("config.json", "generation_config.json"):
        kept = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(kept | changes))


def write_weights(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def without(tensors: Tensors, name: str) -> Tensors:
    return {key: value for key, value in tensors.items() if key != name}


NORM = "model.norm.weight"


@pytest.fixture
def model(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen2", "olmo"])
def test_whole_models_of_several_families_pass(family: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / family, family=family)
    check_files(folder)
    check_weights(folder, "mine")
    check_ids(folder, "mine", load_tokenizer(folder), start_token(load_tokenizer(folder)), read_eos_ids(folder))
    check_causal(load_model(folder, "cpu"), folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: without(tensors, NORM), [f"lacks {NORM}", "random"]),
        (lambda tensors: tensors | {"model.extra.weight": torch.zeros(3)}, ["holds model.extra.weight"]),
        (lambda tensors: {f"_orig_mod.{k}": v for k, v in tensors.items()}, ["lacks", "begin with '_orig_mod.'"]),
        (lambda tensors: {f"module.{k}": v for k, v in tensors.items()}, ["lacks", "begin with 'module.'"]),
        (lambda tensors: tensors | {NORM: torch.ones(7)}, [f"{NORM} (7,) where (32,) is needed"]),
    ],
)
def test_weights_that_are_not_the_architectures_are_named(model: Path, change: Any, words: list[str]) -> None:
    write_weights(model, change)
    with pytest.raises(BadInput) as refused:
        check_weights(model, "mine")
    assert [word for word in words if word not in str(refused.value)] == []


def test_a_head_of_its_own_that_is_missing_is_named(model: Path) -> None:
    """Tied, the head is the embedding; untied and absent, transformers makes up random numbers."""
    check_weights(model, "mine")
    write_config(model, tie_word_embeddings=False)
    with pytest.raises(BadInput, match=r"lacks lm_head\.weight"):
        check_weights(model, "mine")


def test_a_shard_that_is_absent_and_a_file_that_is_cut_short_are_named(model: Path) -> None:
    index = {"metadata": {}, "weight_map": {NORM: "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadInput, match="model-00002-of-00002"):
        check_files(model)
    (model / "model.safetensors.index.json").unlink()
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BadInput, match=r"model\.safetensors is damaged or was cut short"):
        check_files(model)


def test_adapters_quantised_weights_and_other_kinds_are_refused_with_the_remedy(model: Path, tmp_path: Path) -> None:
    write_config(model, quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(BadInput, match=r"quantised weights \(bitsandbytes\).*unquantised model"):
        check_files(model)
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(BadInput, match=r"an adapter.*merge_and_unload"):
        check_files(model)
    T5Config(vocab_size=32, d_model=8).save_pretrained(tmp_path / "t5")
    with pytest.raises(BadInput, match="'t5', which is not a causal language model"):
        check_weights(tmp_path / "t5", "mine")


@pytest.mark.parametrize("is_decoder", [False, True])
def test_causality_is_proved_not_believed(is_decoder: bool, tmp_path: Path) -> None:
    """transformers maps BERT to a causal model whatever its config says; as a decoder it is one."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert = BertLMHeadModel(BertConfig(vocab_size=32, is_decoder=is_decoder, initializer_range=0.3, **sizes)).eval()
    if is_decoder:
        check_causal(bert, tmp_path)
    else:
        with pytest.raises(BadInput, match="is not causal"):
            check_causal(bert, tmp_path)


def test_ids_beyond_the_embedding_and_ordinary_end_tokens_are_refused(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    check_ids(model, "mine", tokenizer, 0, [1])
    check_ids(model, "mine", tokenizer, 0, [1, 5])  # one more than the tokenizer's
    for start, eos_ids, words in (
        (99, [1], "bos_token_id 99 .* outside its vocabulary of 32"),
        (0, [50256], "eos_token_id 50256 .* outside"),
        (0, [5], "eos_token_id 5 .* ordinary token 'd'"),
    ):
        with pytest.raises(BadInput, match=words):
            check_ids(model, "mine", tokenizer, start, eos_ids)
    tokenizer.add_tokens(["<|im_start|>"])
    tokenizer.save_pretrained(model)
    with pytest.raises(BadInput, match=r"'<\|im_start\|>' with id 32, but the model's embedding has 32 rows"):
        check_ids(model, "mine", tokenizer, 0, [1])
