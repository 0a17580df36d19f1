"""A folder that is not a whole, usable causal language model is refused by name, before anything runs."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
)

from cfsd.errors import BadInput
from cfsd.machine import Machine
from cfsd.model.checkpoint import Checkpoint
from cfsd.model.fetching import examine
from cfsd.model.folder import count_parameters, stored_formats
from cfsd.model.loading import load_model
from cfsd.recipe import Recipe
from cfsd.store.artifact import Store
from flows._plan import checked
from flows.mitigate import pipeline
from tests.conftest import fetched, save_model
from tests.model.folders import change_json, in_shards, without, write_config, write_weights

MACHINE = Machine(device="cpu", threads=1)
NORM = "model.norm.weight"
Change = Callable[[Path], Any]


@pytest.fixture
def model(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def refusal(folder: Path) -> str:
    """Return the message with which a folder is refused."""
    with pytest.raises(BadInput) as refused:
        checkpoint = Checkpoint(kind="folder", path=str(folder))
        checkpoint.check()
        examine(checkpoint)
    return str(refused.value)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen2", "olmo"])
def test_whole_models_of_several_families_pass(family: str, tmp_path: Path) -> None:
    examine(Checkpoint(kind="folder", path=str(save_model(tmp_path / family, family=family))))


@pytest.mark.parametrize(
    ("family", "names"), [("gpt2", ("attn.bias", "attn.masked_bias")), ("llama", ())], ids=["gpt2", "llama"]
)
def test_masks_that_old_versions_saved_with_the_weights_are_no_weights(
    family: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    folder = save_model(tmp_path / family, family=family)
    weights = load_file(folder / "model.safetensors")
    added = names or ("model.layers.0.self_attn.attn.masked_bias",)
    prefix = "transformer.h.0." if names else ""
    save_file(weights | {prefix + name: torch.tensor(-1e9) for name in added}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    if names:
        examine(Checkpoint(kind="folder", path=str(folder)))
    else:
        assert "which its architecture does not have" in refusal(folder)


def test_shards_and_files_beside_them_pass_and_are_counted_once(model: Path) -> None:
    parameters = count_parameters(model)
    whole = load_file(model / "model.safetensors")
    in_shards(model)
    save_file(whole, model / "consolidated.safetensors", metadata={"format": "pt"})  # as Mistral's
    examine(Checkpoint(kind="folder", path=str(model)))
    assert count_parameters(model) == parameters


def renamed(prefix: str) -> Change:
    return lambda folder: write_weights(folder, lambda tensors: {f"{prefix}{k}": v for k, v in tensors.items()})


def replaced(name: str, tensor: Any) -> Change:
    return lambda folder: write_weights(folder, lambda tensors: tensors | {name: tensor})


def norm(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    numbers = torch.ones(32)
    numbers[7] = value
    return numbers.to(dtype)


TENSORS: dict[str, tuple[Change, str]] = {
    "one is missing": (lambda f: write_weights(f, lambda t: without(t, NORM)), f"lacks {NORM}: .*random numbers"),
    "one too many": (replaced("model.extra.weight", torch.zeros(3)), "holds model.extra.weight, which"),
    "compiled": (renamed("_orig_mod."), "lacks .*begin with '_orig_mod.': save the inner model"),
    "parallel": (renamed("module."), "lacks .*begin with 'module.'"),
    "another shape": (replaced(NORM, torch.ones(7)), r"model.norm.weight \(7,\) where \(32,\) is needed"),
    "a head of its own is missing": (lambda f: write_config(f, tie_word_embeddings=False), r"lacks lm_head\.weight"),
    "another width": (lambda f: write_config(f, hidden_size=64), "is needed"),
    "more layers": (lambda f: write_config(f, num_hidden_layers=3), r"lacks model\.layers\.2"),
    "more layers than tensors": (lambda f: write_config(f, num_hidden_layers=10**9), "describes 1000000000 layers"),
    "float8": (replaced(NORM, norm(1).to(torch.float8_e4m3fn)), f"{NORM} as F8_E4M3: quantised"),
    "int8": (replaced(NORM, torch.ones(32, dtype=torch.int8)), f"{NORM} as I8: quantised"),
}
NUMBERS = {  # found when all weights are read, by the stage that brings the model into the store
    "NaN": (replaced(NORM, norm(float("nan"))), f"NaN or infinite numbers in {NORM} in model.safetensors"),
    "infinity in bfloat16": (replaced(NORM, norm(float("-inf"), torch.bfloat16)), "NaN or infinite"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_weights_that_are_not_the_architectures_are_named(kind: str, model: Path) -> None:
    change, words = TENSORS[kind]
    change(model)
    with_words(words, refusal(model))


@pytest.mark.parametrize("kind", NUMBERS)
def test_weights_that_are_no_numbers_are_named(kind: str, model: Path, store: Store) -> None:
    change, words = NUMBERS[kind]
    change(model)
    with pytest.raises(BadInput, match=re.escape(words)):
        fetched(store, model)


def with_words(words: str, text: str) -> str:
    """Return the text, which has the words."""
    assert re.search(words, text, re.DOTALL), text
    return text


def test_weights_that_are_large_but_finite_are_left_alone(model: Path) -> None:
    """Their sum overflows, which is no proof."""
    write_weights(model, lambda tensors: tensors | {NORM: torch.full((32,), 3e38)})
    examine(Checkpoint(kind="folder", path=str(model)))


@pytest.mark.parametrize("number", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_in_any_format_of_floats_are_no_quantised_ones(number: torch.dtype, model: Path) -> None:
    write_weights(model, lambda tensors: {name: tensor.to(number) for name, tensor in tensors.items()})
    examine(Checkpoint(kind="folder", path=str(model)))
    assert stored_formats(model).most == str(number).removeprefix("torch.")


def test_a_config_that_asks_for_tuples_changes_nothing(model: Path) -> None:
    ids = torch.tensor([[1, 5, 6]])
    expected = load_model(model, "cpu")(input_ids=ids).logits
    change_json(model / "config.json", return_dict=False)
    assert load_model(model, "cpu")(input_ids=ids).logits.equal(expected)


@pytest.mark.parametrize("kind", ["classification", "embedding", "value head"])
def test_a_model_with_another_head_is_told_what_it_is(kind: str, model: Path) -> None:
    config: Any = AutoConfig.from_pretrained(model, tie_word_embeddings=False, num_labels=1)
    if kind == "value head":
        write_weights(model, lambda tensors: tensors | {"v_head.summary.weight": torch.ones(1, 32)})
        words = r"holds v_head.summary.weight.*leave them out.*save the language model alone"
    elif kind == "classification":
        LlamaForSequenceClassification(config).save_pretrained(model)
        words = "says that a LlamaForSequenceClassification was saved, not a LlamaForCausalLM"
    else:
        LlamaModel(config).save_pretrained(model)
        words = "lacks lm_head.weight.*says that a LlamaModel was saved, not a LlamaForCausalLM"
    with_words(words, refusal(model))


@pytest.mark.parametrize("fields, words", [
    ({"dtype": "auto"}, "dtype 'auto'; allowed: float32, bfloat16, float16, float64"),
    ({"dtype": {"": "float32"}}, "dtype .*float32'}; allowed"),
    ({"pad_token_id": 32}, "pad_token_id 32 .* outside its vocabulary of 32 tokens"),
    ({"hidden_act": "nope"}, "KeyError: 'nope'.*; correct config.json"),
])  # fmt: skip
def test_a_config_with_a_wrong_value_is_refused(fields: dict[str, Any], words: str, model: Path) -> None:
    change_json(model / "config.json", **fields)
    with_words(words, refusal(model))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_a_file_that_other_libraries_could_not_read_is_refused(name: str, model: Path) -> None:
    (model / name).write_bytes(b"\xef\xbb\xbf" + (model / name).read_bytes())
    with_words(f"{name} is not valid JSON .*BOM", refusal(model))


def pointer(file: str) -> Change:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    return lambda folder: (folder / file).write_text(text)


def written(file: str, text: str) -> Change:
    return lambda folder: (folder / file).write_text(text)


def cut(file: str, count: int = 100) -> Change:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-count])


def shard_of_another(folder: Path) -> None:
    places = in_shards(folder)
    file = folder / min(places.values())
    tensors = load_file(file)
    save_file({f"other.{name}": value for name, value in tensors.items()}, file, metadata={"format": "pt"})


def shard_left_out(folder: Path) -> None:
    (folder / max(in_shards(folder).values())).unlink()


def dangling(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "blobs" / "0")


def as_adapter(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")


def into_subfolder(folder: Path) -> None:
    inner = folder / "checkpoint-50"
    inner.mkdir()
    for path in list(folder.iterdir()):
        if path.is_file():
            path.rename(inner / path.name)


def remote(folder: Path) -> None:
    change_json(folder / "config.json", model_type="mine", auto_map={"AutoModelForCausalLM": "modeling.Mine"})
    (folder / "modeling.py").write_text("raise SystemExit('executed')")


FILES: dict[str, tuple[Change, str]] = {
    "weights cut": (cut("model.safetensors"), r"model\.safetensors is damaged or was cut short"),
    "weights empty": (written("model.safetensors", ""), r"model\.safetensors is damaged or was cut short"),
    "weights a pointer": (pointer("model.safetensors"), r"model\.safetensors is a Git LFS pointer.*git lfs pull"),
    "weights of another name": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.safetensors"),
        r"holds pytorch_model\.safetensors, but neither model\.safetensors nor"),
    "a link to nowhere": (dangling, r"model\.safetensors is a link to .*blobs/0, which does not exist"),
    "a shard left out": (shard_left_out, r"index\.json names model-00002-of-00002\.safetensors, which"),
    "a shard of another model": (shard_of_another, r"index\.json and the files do not agree about"),
    "an index that is cut": (lambda f: (in_shards(f), cut("model.safetensors.index.json")(f)), "not valid JSON"),
    "an index of nothing": (
        lambda f: (in_shards(f), written("model.safetensors.index.json", "{}")(f)), "no `weight_map`"),
    "an index that leads out": (
        lambda f: (in_shards(f), change_json(f / "model.safetensors.index.json", weight_map={NORM: "../x.bin"})),
        "names ../x.bin"),
    "config cut": (cut("config.json"), r"config\.json is not valid JSON"),
    "config a list": (written("config.json", "[1]"), r"config\.json holds \[1\] where a JSON object"),
    "config empty": (written("config.json", ""), r"config\.json is empty"),
    "config {}": (written("config.json", "{}"), "model_type None, so nobody knows"),
    "config of bytes": (lambda f: (f / "config.json").write_bytes(b"\x80\x81"), "not valid JSON"),
    "config a pointer": (pointer("config.json"), r"config\.json is a Git LFS pointer"),
    "unknown architecture": (lambda f: change_json(f / "config.json", model_type="mine"), "`mine`|model_type"),
    "code of its own": (remote, r"Python code that comes with it .auto_map.*never executed"),
    "config with a wrong value": (lambda f: change_json(f / "config.json", hidden_size="big"), "hidden_size"),
    "encoder and decoder": (lambda f: T5Config(vocab_size=32, d_model=8).save_pretrained(f), "encoder with a decoder"),
    "no language model": (lambda f: change_json(f / "config.json", model_type="vit"), "'vit', which is not a causal"),
    "generation config cut": (cut("generation_config.json", 9), r"generation_config\.json is not valid JSON"),
    "tokenizer cut": (cut("tokenizer.json"), r"tokenizer\.json is not valid JSON"),
    "tokenizer of nothing": (written("tokenizer.json", "{}"), "tokenizer in .* cannot be loaded"),
    "tokenizer a pointer": (pointer("tokenizer.json"), r"tokenizer\.json is a Git LFS pointer"),
    "tokenizer config cut": (cut("tokenizer_config.json", 9), r"tokenizer_config\.json is not valid JSON"),
    "quantised": (
        lambda f: write_config(f, quantization_config={"quant_method": "gptq"}),
        r"quantised weights \(gptq\).*unquantised"),
    "an adapter": (as_adapter, "an adapter.*merge_and_unload"),
    "an adapter's config beside": (written("adapter_config.json", "{}"), "a whole model and adapter_config"),
    "quantised by MLX": (lambda f: write_config(f, quantization={"bits": 4}), "quantised weights"),
    "quantised by the first GPTQ": (written("quantize_config.json", "{}"), r"quantised weights \(gptq\)"),
    "no tokenizer": (lambda f: [path.unlink() for path in f.glob("tokenizer*")], "has no tokenizer"),
    "in a subfolder": (into_subfolder, "there is a model in .*checkpoint-50: give that folder"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_a_folder_with_broken_files_is_refused_by_name(kind: str, model: Path) -> None:
    change, words = FILES[kind]
    change(model)
    said = with_words(words, refusal(model))
    assert "/tmp/tmp" not in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("model.safetensors", "is not a folder but a file: give the folder that it is in"),
        ("q4.gguf", "GGUF.*llama.cpp"),
    ],
)
def test_a_file_in_place_of_a_folder_is_told_apart(file: str, words: str, model: Path) -> None:
    (model / "q4.gguf").touch()
    with_words(words, refusal(model / file))


TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
MULTIMODAL: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 4},
    "llama4": {
        "text_config": TEXT | {"intermediate_size_mlp": 32, "num_local_experts": 2},
        "vision_config": VISION | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    },
    "llava": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": VISION | {"model_type": "clip_vision_model", "projection_dim": 16},
    },
}


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_a_multimodal_model_is_refused_with_a_command_that_saves_its_text_model(
    kind: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **MULTIMODAL[kind])).eval()
    whole.save_pretrained(tmp_path / "whole")
    for path in model_folder.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "whole")
    said = with_words(
        f"is of type '{kind}', which reads more than text; save its text model", refusal(tmp_path / "whole")
    )
    command = shlex.split(said[said.index("python -c") :])
    exec(command[2], {})
    change_json(tmp_path / "TEXT" / "generation_config.json", eos_token_id=1)  # of the borrowed tokenizer
    examine(Checkpoint(kind="folder", path=str(tmp_path / "TEXT")))
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "TEXT").eval()
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(text(input_ids=ids).logits, whole(input_ids=ids).logits)


def test_a_multimodal_model_without_a_text_model_of_its_own_is_refused(model: Path) -> None:
    kept = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", "text_config": {"vocab_size": 32}}))
    with_words("'qwen2_5_vl', which reads more than text; take a model of its family", refusal(model))
    (model / "config.json").write_text(json.dumps(kept | {"text_config": {"vocab_size": 32}}))
    with_words("'llama', which reads more than text", refusal(model))


def test_a_plan_examines_the_base_until_it_is_in_the_store(
    store: Store, model: Path, recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.load(recipe_file, [f"base.path={model}"])
    weights = (model / "model.safetensors").read_bytes()
    write_weights(model, lambda tensors: without(tensors, NORM))
    with pytest.raises(BadInput, match=f"lacks {NORM}"), checked([recipe], MACHINE, pipeline):
        pass
    (model / "model.safetensors").write_bytes(weights)
    with checked([recipe], MACHINE, pipeline) as plans:
        assert not plans[0].steps[0].cached
    fetched(store, model)
    monkeypatch.setattr("cfsd.model.fetching.examine", lambda checkpoint: pytest.fail("examined again"))
    with checked([recipe], MACHINE, pipeline) as plans:
        assert plans[0].steps[0].cached
