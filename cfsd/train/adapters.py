"""Adapters: small matrices that PEFT trains beside the base's, and that are merged into them at the end."""

from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cfsd.errors import BadInput
from cfsd.store.digests import write_json
from cfsd.train.methods import Methods

FOLDER = "adapter"


def adapt(methods: Methods, model: PreTrainedModel) -> nn.Module:
    """Return what is trained in place of `model`: it computes the same, and the weights of `model` are frozen.

    Without an adapter that is `model` itself. Draws from torch's global generator.
    Raises BadInput for a target that the model does not have.
    """
    adapter = methods.adapter()
    if adapter is None:
        return model
    head = model.get_output_embeddings()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head}
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=_targets(adapter.targets, layers),
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers.values()),
    )  # no task type: PEFT then passes all arguments of a call on as they are
    adapted: nn.Module = get_peft_model(model, config)
    return adapted


def _targets(targets: tuple[str, ...], layers: dict[str, Any]) -> list[str]:
    known = {name.rpartition(".")[2] for name in layers}
    wanted = targets or tuple(known)
    strange = [name for name in wanted if not any(f".{layer}".endswith(f".{name}") for layer in layers)]
    if strange:
        raise BadInput(
            f"lora.targets {', '.join(strange)}: this model has no such linear layer; "
            f"allowed: {', '.join(sorted(known))}; leave it empty for all of them"
        )
    return sorted(wanted)


def merge_adapter(methods: Methods, model: nn.Module, folder: Path) -> PreTrainedModel:
    """Return the plain transformers model that computes what `model` does; write the adapter to `folder`/adapter.

    The adapter has the same bytes on every machine. PEFT's own save would add the base's path, its version and a model
    card, and list targets in the order of a set.
    """
    if methods.adapter() is None:
        return cast(PreTrainedModel, model)
    adapted: Any = model
    (folder / FOLDER).mkdir(exist_ok=True)
    tensors = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / FOLDER / "adapter_model.safetensors", {"format": "pt"})
    config = adapted.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": None, "inference_mode": True, "task_type": "CAUSAL_LM"}
    config["target_modules"] = sorted(config["target_modules"])
    del config["peft_version"]
    write_json(folder / FOLDER / "adapter_config.json", config)
    merged: PreTrainedModel = adapted.merge_and_unload()
    return merged
