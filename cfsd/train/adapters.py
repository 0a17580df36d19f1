"""Adapters: small matrices that PEFT trains beside the base's, and that are merged into them at the end."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import LoraConfig, LoraModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cfsd.errors import BadInput
from cfsd.model.undisturbed import mode_kept
from cfsd.store.digests import write_json
from cfsd.train.methods import Methods

FOLDER = "adapter"
TRIAL = 16  # tokens
SMALL = 0.01  # of all layers' weights: names of what is left out are not listed below this


def adapt(methods: Methods, model: PreTrainedModel) -> nn.Module:
    """Return what is trained in place of `model`: it computes the same, and the weights of `model` are frozen.

    Without an adapter that is `model` itself. Draws from torch's global generator.
    Raises BadInput for a target that the model does not have, or that PEFT cannot stand beside.
    """
    adapter = methods.adapter()
    if adapter is None:
        return model
    layers = _linear_layers(model)
    modules, parameters = _targets(adapter.targets, layers, model)
    config: Any = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=modules,
        target_parameters=parameters or None,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers.values()),
    )  # no task type: PEFT then passes all arguments of a call on as they are
    if not adapter.targets:
        config.target_modules = {name for name in modules if _is_allowed(config, model, name)}
    try:
        adapted: nn.Module = get_peft_model(model, config)
    except ValueError as error:
        raise BadInput(f"lora.targets {', '.join(adapter.targets) or 'empty'}: {error}") from error
    return adapted


def _targets(targets: tuple[str, ...], layers: dict[str, Any], model: nn.Module) -> tuple[list[str], list[str]]:
    """Return the linear layers and the fused parameters that `targets` name; without any, all linear layers.

    A name that other parts of the model have as well, such as the `0` of a list, stands for its layers' full names.
    """
    known, fused = {_last(name) for name in layers}, _fused(model)
    others = {_last(name) for name, _ in model.named_modules() if name not in layers}
    modules: list[str] = []
    for wanted in [name for name in targets or known if _ends(layers, name)]:
        alike = wanted in others
        modules += [name for name in layers if f".{name}".endswith(f".{wanted}")] if alike else [wanted]
    parameters = sorted(name for name in targets if name not in modules and _ends(fused, name))
    strange = [name for name in targets if not _ends(layers, name) and name not in parameters]
    if strange:
        also = f", or of the experts {', '.join(sorted({_last(name) for name in fused}))}" if fused else ""
        raise BadInput(
            f"lora.targets {', '.join(strange)}: this model has no such linear layer; "
            f"allowed: {', '.join(sorted(known))}{also}; leave it empty for all linear layers"
        )
    return sorted(modules), parameters


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _ends(names: Iterable[str], wanted: str) -> bool:
    return any(f".{name}".endswith(f".{wanted}") for name in names)


def _fused(model: nn.Module) -> list[str]:
    """Return the names of parameters that hold a matrix for each of several experts."""
    return [
        name for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and not isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Conv1d)
    ]  # fmt: skip


def _is_allowed(config: LoraConfig, model: nn.Module, name: str) -> bool:
    """Say whether PEFT stands beside a layer: not where a kernel on CUDA would read its weights past it (Mamba)."""
    tuner: Any = LoraModel
    try:
        tuner._check_target_module_compatiblity(None, config, model, _last(name))
    except ValueError:
        return False
    return True


def _linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the linear layers but the head, by full name, that a matrix can stand beside.

    It is tried: not those that give more than a product (Llama 4's router), and not those whose weights the model reads
    without calling them (Mamba's time step), where the added matrices would have no effect.
    """
    head = model.get_output_embeddings()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head}
    given: dict[str, Any] = {}
    hooks = [
        layer.register_forward_hook(lambda _, __, output, name=name: given.update({name: output}))
        for name, layer in layers.items()
    ]
    ids = torch.randint(_vocabulary(model), (1, TRIAL), generator=torch.Generator().manual_seed(0)).to(model.device)
    with mode_kept(model), torch.no_grad():
        model.eval()(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    layers = {name: layer for name, layer in layers.items() if isinstance(given.get(name, ids), Tensor)}
    past = _read_past(model, {name: layer for name, layer in layers.items() if name not in given}, ids)
    return {name: layer for name, layer in layers.items() if name not in past}


def _read_past(model: PreTrainedModel, uncalled: dict[str, Any], ids: Tensor) -> set[str]:
    """Return which layers have an effect without having been called; the others, as idle experts, have none."""
    if not uncalled:
        return set()
    weights = [layer.weight for layer in uncalled.values()]
    asked = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    with mode_kept(model), torch.enable_grad():
        for weight in weights:
            weight.requires_grad_(True)
        total = model.eval()(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum()
        used = total.requires_grad
        slopes = torch.autograd.grad(total, weights, allow_unused=True) if used else [None] * len(weights)
    for parameter, wanted in asked:
        parameter.requires_grad_(wanted)
    return {name for name, slope in zip(uncalled, slopes, strict=True) if slope is not None}


def _vocabulary(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config(decoder=True).vocab_size)


class Trained(NamedTuple):
    """Which of a model's matrices, but for embeddings and output layer, have an adapter beside them."""

    share: float  # of their numbers
    left_out: list[str]  # names of the others, as they end

    def note(self) -> str | None:
        """Return the line that says what is not trained, or None."""
        if not self.left_out:
            return None
        return f"lora stands beside {self.share:.0%} of the layers' weights, not beside {', '.join(self.left_out)}"


def trained_by(model: PreTrainedModel) -> Trained:
    """Return what the adapter in `model` trains."""
    adapted = {id(_adapted(part)) for part in model.modules() if isinstance(part, LoraLayer)}
    around = (model.get_output_embeddings(), *(part for part in model.modules() if isinstance(part, nn.Embedding)))
    outside = {id(parameter) for part in around if part is not None for parameter in part.parameters()}
    trained, total, left_out = 0, 0, Counter[str]()
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or ".lora_" in name or id(parameter) in outside:
            continue
        numel = parameter.numel()
        total += numel
        if id(parameter) in adapted:
            trained += numel
        else:
            left_out[".".join(name.removesuffix(".weight").replace(".base_layer", "").split(".")[-2:])] += numel
    return Trained(trained / max(1, total), sorted(name for name, size in left_out.items() if size > SMALL * total))


def _adapted(layer: Any) -> Any:
    base: Any = layer.get_base_layer()
    return getattr(base, layer.parameter_name) if isinstance(layer, ParamWrapper) else base.weight


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
    for name in ("target_modules", "target_parameters"):
        config[name] = None if config[name] is None else sorted(config[name])
    del config["peft_version"]
    write_json(folder / FOLDER / "adapter_config.json", config)
    merged: PreTrainedModel = adapted.merge_and_unload()
    return merged
