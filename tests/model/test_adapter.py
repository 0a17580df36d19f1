"""An adapter merged into its base computes what PEFT computes with the two, and what does not fit is refused."""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, PromptTuningConfig, VBLoRAConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cfsd.errors import BadInput
from cfsd.model.adapter import Adapter
from cfsd.model.adapter_merging import merge
from cfsd.model.checkpoint import Checkpoint
from cfsd.model.folder import START
from cfsd.model.loading import load_tokenizer
from tests.conftest import save_model
from tests.model.folders import change_json

LLAMA = ["q_proj", "down_proj"]


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": LLAMA, "task_type": "CAUSAL_LM"} | settings)


KINDS: dict[str, tuple[str, Any]] = {
    "lora": ("llama", lora()),
    "without a task": ("llama", lora(task_type=None)),
    "every linear layer": ("qwen2", lora(target_modules="all-linear")),
    "dora": ("llama", lora(use_dora=True)),
    "rank-stabilised": ("llama", lora(use_rslora=True)),
    "begun from singular vectors": ("llama", lora(init_lora_weights="pissa")),
    "ranks by layer": ("llama", lora(rank_pattern={"down_proj": 2}, alpha_pattern={"q_proj": 3})),
    "one layer": ("llama", lora(layers_to_transform=[1])),
    "parameters": ("llama", lora(target_modules=[], target_parameters=["q_proj.weight"])),
    "with biases": ("gpt2", lora(target_modules=["c_attn"], fan_in_fan_out=True, bias="all")),
    "with the norms": ("llama", lora(modules_to_save=["norm"])),
    "with tied embeddings": ("llama", lora(modules_to_save=["embed_tokens"])),
    "with a tied head": ("llama", lora(modules_to_save=["lm_head"])),
    "with both, kept tied": ("llama", lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "of tied embeddings": ("llama", lora(target_modules=["q_proj", "embed_tokens"])),
    "of a tied head": ("llama", lora(target_modules=["q_proj", "lm_head"])),
    "of some tokens": ("llama", lora(trainable_token_indices=[3, 4])),
    "loha": ("llama", LoHaConfig(r=4, target_modules=LLAMA, task_type="CAUSAL_LM")),
    "vectors of one bank": (
        "llama",
        VBLoRAConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", vector_length=8, num_vectors=4, topk=2),
    ),
    "ia3": ("llama", IA3Config(target_modules=LLAMA, feedforward_modules=["down_proj"], task_type="CAUSAL_LM")),
}


def trained(base: Path, folder: Path, config: Any) -> Path:
    """Write an adapter whose tensors are all random, so that each of them changes the model."""
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), deepcopy(config))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder


def base_of(folder: Path, family: str = "llama") -> Path:
    """Write a base as the store holds it, with its start token."""
    base = save_model(folder, family=family)
    (base / START).write_text('{"start_token": 0}')
    return base


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Return the logits for fixed random tokens."""
    ids = torch.randint(2, 30, (2, 12), generator=torch.Generator().manual_seed(0))
    result: torch.Tensor = model.eval()(input_ids=ids).logits
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_computes_what_base_and_adapter_do(kind: str, tmp_path: Path) -> None:
    family, config = KINDS[kind]
    base = base_of(tmp_path / "base", family)
    adapter = trained(base, tmp_path / "adapter", config)
    metadata = merge(base, Adapter(path=str(adapter)), tmp_path / "merged")
    both = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))
    alone = logits(AutoModelForCausalLM.from_pretrained(base))
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert float((both - alone).abs().max()) > 0.01, "the adapter changes the model"
    torch.testing.assert_close(merged, both, rtol=1e-4, atol=1e-5)
    assert metadata["adapter"] == "adapter"


def _json(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


def _tensors(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file(change(load_file(file)), file)

    return changed


def _cut(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:200])


def _whole(folder: Path) -> None:
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "pickled": (lambda f: (f / "adapter_model.safetensors").unlink(), r"no adapter_model\.safetensors"),
    "cut": (_cut, "damaged or was cut short"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{") and None, "is not valid JSON"),
    "a classifier's": (_json(task_type="SEQ_CLS"), "the task SEQ_CLS"),
    "of the prompt": (_json(peft_type="PROMPT_TUNING"), "PROMPT_TUNING, which is no change of weights"),
    "an unknown kind": (_json(peft_type="NOVEL"), "NOVEL, which PEFT .* does not know"),
    "a newer setting": (_json(use_novel=True), r"does not know \(use_novel\)"),
    "no kind": (_json(peft_type=None), "peft_type None"),
    "a wrong value": (_json(r=-1), "does not fit the base"),
    "LoftQ": (_json(init_lora_weights="loftq"), "began with loftq"),
    "a random beginning": (_json(init_lora_weights="pissa_niter_4"), "began with pissa_niter_4"),
    "a beginning from gradients": (_json(init_lora_weights="lora_ga"), "began with lora_ga"),
    "of a compiled model": (
        _tensors(lambda t: {k.replace("model.model.", "model._orig_mod.model."): v for k, v in t.items()}),
        "_orig_mod.* which the base lacks",
    ),
    "saved in parts": (_tensors(lambda t: {k: v.new_zeros(0) for k, v in t.items()}), "has the shape \\(0\\) where"),
    "a whole model too": (_whole, "a whole model and an adapter"),
    "not a number": (_tensors(lambda t: {k: v * float("nan") for k, v in t.items()}), "holds NaN or infinity"),
    "another rank": (_json(r=8), r"fit the base: base_model.* has the shape \(4, 32\) where \(8, 32\) is needed"),
    "other layers": (_json(target_modules=["query"]), "does not fit the base: .*query"),
    "fewer tensors": (_tensors(lambda t: dict(list(t.items())[1:])), "lacks base_model"),
    "more tensors": (_tensors(lambda t: t | {"base_model.model.x.lora_A.weight": torch.zeros(1)}), "the base lacks"),
    "no tensor": (_tensors(lambda _: {}), "holds no tensor"),
    "more tokens": (
        _tensors(lambda t: t | {"base_model.model.model.embed_tokens.weight": torch.zeros(40, 32)}),
        "trained with 40 tokens and the base has",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_refused(fault: str, tmp_path: Path) -> None:
    spoil, message = FAULTS[fault]
    base = base_of(tmp_path / "base")
    adapter = trained(base, tmp_path / "adapter", KINDS["lora"][1])
    spoil(adapter)
    with pytest.raises(BadInput, match=f"(?s){message}"):
        merge(base, Adapter(path=str(adapter)), tmp_path / "merged")


def test_a_tokenizer_of_its_own_must_be_the_bases(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    adapter = trained(base, tmp_path / "adapter", KINDS["lora"][1])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (adapter / name).write_text((base / name).read_text().replace('"a"', '"A"'))
    with pytest.raises(BadInput, match="they differ in 2 tokens"):
        merge(base, Adapter(path=str(adapter)), tmp_path / "merged")


def test_its_identity_is_its_content(tmp_path: Path, home: Path) -> None:
    base = base_of(tmp_path / "base")
    adapter = trained(base, tmp_path / "adapter", KINDS["lora"][1])
    before = Adapter(path=str(adapter)).digest()
    adapter.rename(tmp_path / "moved")
    assert Adapter(path=str(tmp_path / "moved")).digest() == before
    _tensors(lambda t: {k: v + 1 for k, v in t.items()})(tmp_path / "moved")
    assert Adapter(path=str(tmp_path / "moved")).digest() != before


def test_a_prompt_adapter_that_peft_wrote_is_refused(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    adapter = trained(base, tmp_path / "adapter", config)
    with pytest.raises(BadInput, match="is no change of weights"):
        Adapter(path=str(adapter)).check()


def test_shared_weights_that_an_adapter_holds_are_those_of_head_and_embedding(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    adapter = trained(base, tmp_path / "adapter", lora(target_modules=["q_proj", "lm_head"]))
    head = "base_model.model.lm_head.base_layer.weight"
    _tensors(lambda t: t | {head: t[head] + 0.3 * torch.randn(32, 32)})(adapter)
    merge(base, Adapter(path=str(adapter)), tmp_path / "merged")
    both = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), both, rtol=1e-4, atol=1e-5
    )


def test_what_is_no_change_of_weights_is_refused(tmp_path: Path) -> None:
    """An activated LoRA changes what follows its invocation alone: merged, it would change everything."""
    base = base_of(tmp_path / "base")
    adapter = trained(base, tmp_path / "adapter", lora(alora_invocation_tokens=[5, 6]))
    with pytest.raises(BadInput, match="cannot be merged"):
        merge(base, Adapter(path=str(adapter)), tmp_path / "merged")


def test_a_merged_model_is_stored_in_the_format_of_its_base(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base).to(torch.bfloat16).save_pretrained(base)
    adapter = trained(base, tmp_path / "adapter", lora())
    merge(base, Adapter(path=str(adapter)), tmp_path / "merged")
    assert {str(t.dtype) for t in load_file(tmp_path / "merged" / "model.safetensors").values()} == {"torch.bfloat16"}


def test_the_format_of_a_model_is_that_of_its_weights_whatever_its_config_says(tmp_path: Path) -> None:
    """Rounded to the 16 bits that a config promises, a model of 32 would have changed by more than its training."""
    base = base_of(tmp_path / "base")
    change_json(base / "config.json", dtype="bfloat16")
    adapter = trained(base, tmp_path / "adapter", lora())
    merge(base, Adapter(path=str(adapter)), tmp_path / "merged")
    assert {str(t.dtype) for t in load_file(tmp_path / "merged" / "model.safetensors").values()} == {"torch.float32"}


def test_another_chat_template_is_said_and_the_bases_tokenizer_is_used(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    adapter = trained(base, tmp_path / "adapter", lora())
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(adapter)
    said = merge(base, Adapter(path=str(adapter)), tmp_path / "merged")["said"]
    assert said == ["adapter adapter has another chat template in its tokenizer; the base's is used"]
    assert load_tokenizer(tmp_path / "merged").chat_template is None


def test_folders_that_a_trainer_leaves(tmp_path: Path, model_folder: Path) -> None:
    run = tmp_path / "run"
    adapter = trained(model_folder, run / "checkpoint-500", lora())
    (adapter / "optimizer.pt").write_bytes(b"never read")
    found = Adapter.at(str(adapter))
    assert found and found.label() == "run/checkpoint-500"
    found.check()
    assert Adapter.at(str(model_folder)) is None and Adapter.at(None) is None and Adapter.at("tiny") is None
    with pytest.raises(BadInput, match=r"no model and no adapter itself, but adapters in .*checkpoint-500"):
        Adapter.at(str(run))
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(BadInput, match=r"adapter_config\.json cannot be read"):
        Adapter(path=str(adapter)).check()


@pytest.mark.parametrize("place", ["mine", 'it\'s $HOME `x` "y"'])
def test_the_command_that_merges_an_adapter_works_as_it_is_printed(place: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base of mine")
    adapter = trained(base, tmp_path / place, lora())
    with pytest.raises(BadInput, match="holds an adapter, not a whole model") as refused:
        Checkpoint.model_validate(str(adapter)).check()
    command = str(refused.value).partition("MERGED: ")[2].replace("python", shlex.quote(sys.executable), 1)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path, capture_output=True)
    Checkpoint.model_validate(str(tmp_path / "MERGED")).check()
    both = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "MERGED"))
    torch.testing.assert_close(merged, both, rtol=1e-4, atol=1e-5)
