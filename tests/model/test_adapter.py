"""An adapter merged into its base computes what PEFT computes with the two, and what does not fit is refused."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cfsd.errors import BadInput
from cfsd.model.adapter import Adapter, is_adapter
from cfsd.model.adapter_merging import merge
from cfsd.model.checkpoint import START
from tests.conftest import save_model

LLAMA = ["q_proj", "down_proj"]
KINDS: dict[str, tuple[str, Any]] = {
    "lora": ("llama", LoraConfig(r=4, target_modules=LLAMA, task_type="CAUSAL_LM")),
    "without a task": ("llama", LoraConfig(r=4, target_modules=LLAMA)),
    "every linear layer": ("qwen2", LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")),
    "dora": ("llama", LoraConfig(r=4, target_modules=LLAMA, use_dora=True, task_type="CAUSAL_LM")),
    "rank-stabilised": ("llama", LoraConfig(r=4, target_modules=LLAMA, use_rslora=True, task_type="CAUSAL_LM")),
    "with biases": ("gpt2", LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, bias="all")),
    "with the norms": ("llama", LoraConfig(r=4, target_modules=LLAMA, modules_to_save=["norm"])),
    "with tied embeddings": ("llama", LoraConfig(r=4, target_modules=LLAMA, modules_to_save=["embed_tokens"])),
    "loha": ("llama", LoHaConfig(r=4, target_modules=LLAMA, task_type="CAUSAL_LM")),
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
    metadata = merge(base, Adapter(path=str(adapter)), tmp_path / "merged", "cpu")
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


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "pickled": (lambda f: (f / "adapter_model.safetensors").unlink(), r"no adapter_model\.safetensors"),
    "cut": (_cut, "damaged or was cut short"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{") and None, "cannot be read"),
    "a classifier's": (_json(task_type="SEQ_CLS"), "the task SEQ_CLS"),
    "of the prompt": (_json(peft_type="PROMPT_TUNING"), "PROMPT_TUNING, which adds to the prompt"),
    "an unknown kind": (_json(peft_type="NOVEL"), "does not fit the base"),
    "another rank": (_json(r=8), "does not fit the base: .*size mismatch"),
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
        merge(base, Adapter(path=str(adapter)), tmp_path / "merged", "cpu")


def test_a_tokenizer_of_its_own_must_be_the_bases(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    adapter = trained(base, tmp_path / "adapter", KINDS["lora"][1])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (adapter / name).write_text((base / name).read_text().replace('"a"', '"A"'))
    with pytest.raises(BadInput, match="they differ in 2 tokens"):
        merge(base, Adapter(path=str(adapter)), tmp_path / "merged", "cpu")


def test_its_identity_is_its_content(tmp_path: Path, home: Path) -> None:
    base = base_of(tmp_path / "base")
    adapter = trained(base, tmp_path / "adapter", KINDS["lora"][1])
    before = Adapter(path=str(adapter)).digest()
    adapter.rename(tmp_path / "moved")
    assert Adapter(path=str(tmp_path / "moved")).digest() == before
    _tensors(lambda t: {k: v + 1 for k, v in t.items()})(tmp_path / "moved")
    assert Adapter(path=str(tmp_path / "moved")).digest() != before
    assert is_adapter(str(tmp_path / "moved")) and not is_adapter(str(base)) and not is_adapter(None)


def test_a_prompt_adapter_that_peft_wrote_is_refused(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    adapter = trained(base, tmp_path / "adapter", config)
    with pytest.raises(BadInput, match="adds to the prompt"):
        Adapter(path=str(adapter)).check()
