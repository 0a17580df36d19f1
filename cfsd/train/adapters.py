"""Adapters: small matrices that PEFT trains beside the base's, and that are merged into them at the end."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import LoraConfig, LoraModel, OSFConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.osf.layer import OSFLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.pytorch_utils import Conv1D

from cfsd.errors import BadInput
from cfsd.model.loading import load_model, skeleton
from cfsd.model.undisturbed import mode_kept
from cfsd.store.digests import write_json
from cfsd.train.methods import Methods
from cfsd.train.methods.method import TrainedAdapter

FOLDER = "adapter"
TRIAL = 16  # tokens
QUANTISABLE = 0.5  # of all weights, below which holding linear layers in 4 bits would not make a model fit
SMALL = 0.01  # of all layers' weights: names of what is left out are not listed below this


def adapt(methods: Methods, model: PreTrainedModel) -> nn.Module:
    """Return what is trained in place of `model`: it computes the same, and the weights of `model` are frozen.

    Without an adapter that is `model` itself. Draws from torch's global generator.
    Raises BadInput for a target that the model does not have, or that PEFT cannot stand beside.
    """
    adapter = methods.adapter()
    if adapter is None:
        return model
    name, config = next(iter(methods.adapters())), _config(adapter, model)
    try:
        adapted: nn.Module = get_peft_model(model, config)
    except ValueError as error:
        raise BadInput(f"{name}.targets {', '.join(adapter.targets) or 'empty'}: {error}") from error
    return adapted


def check_layers(folder: Path, methods: Methods) -> None:
    """Raise BadInput where an adapter names layers that the model in `folder` does not have; reads no weights.

    Layers that PEFT cannot stand beside are found by `adapt`, which tries them.
    """
    adapter, model = methods.adapter(), skeleton(folder)
    if adapter and model is not None:
        _named(adapter, _all_linear_layers(model), model)
        if adapter.quantise:
            _check_quantised(model)


def _check_quantised(model: PreTrainedModel) -> None:
    """Raise BadInput where most weights are in no linear layer, as those of experts: they would stay in 32 bits."""
    linear = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear | nn.Embedding | Conv1D)]
    share = sum({id(weight): weight.numel() for weight in linear}.values()) / model.num_parameters()
    if share < QUANTISABLE:
        raise BadInput(
            f"lora.quantise holds linear layers in 4 bits, but only {share:.0%} of this model's weights are in such "
            "layers or in its embedding: experts are not, and stay in 32 bits; leave quantise out, with the memory "
            "that `--plan` names, or take a dense model"
        )


def _named(
    adapter: TrainedAdapter, layers: dict[str, nn.Module], model: PreTrainedModel
) -> tuple[list[str], list[str]]:
    """Return the layers and the fused parameters that an adapter stands beside."""
    if adapter.kind == "osf":
        linear: dict[str, nn.Module] = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}
        if not linear:
            raise BadInput("osft is for models of linear layers, which this one (of Conv1D, as GPT-2) has none of")
        return _targets(adapter.targets, _dividable(adapter, linear), model, "osft")[0], []
    modules, parameters = _targets(adapter.targets, layers, model, "lora")
    return modules, parameters + _experts(adapter.parameters, model)


def _dividable(adapter: TrainedAdapter, layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the layers of which the share of directions that stays is one or more, as PEFT counts: rounded down.

    A gate of one row has none. Raises BadInput where `targets` name such a layer.
    """
    share: float = adapter.settings["effective_rank"]
    weights: Any = {name: layer.weight for name, layer in layers.items()}
    rows = {name: min(weight.shape) for name, weight in weights.items()}
    small = [name for name in layers if int(rows[name] * share) == 0]
    if named := [name for name in small if any(_ends([name], wanted) for wanted in adapter.targets)]:
        raise BadInput(
            f"osft.targets names {named[0]}: the share {share:g} of its directions, {rows[named[0]]} in all, is less "
            "than one; leave it out of osft.targets"
        )
    return {name: layer for name, layer in layers.items() if name not in small}


def _config(adapter: TrainedAdapter, model: PreTrainedModel) -> Any:
    """Return PEFT's config. Without a task type PEFT passes all arguments of a call on as they are."""
    layers = _linear_layers(model)
    modules, parameters = _named(adapter, layers, model)
    if adapter.kind == "osf":
        return OSFConfig(**adapter.settings, target_modules=modules)
    turned = any(isinstance(layer, Conv1D) for layer in layers.values())
    config: Any = LoraConfig(
        **adapter.settings, target_modules=modules, target_parameters=sorted({*parameters}) or None,
        fan_in_fan_out=turned,
    )  # fmt: skip
    if not adapter.targets:
        config.target_modules = {name for name in modules if _is_allowed(config, model, name)}
    return config


class KeepDirections(TrainerCallback):
    """Puts OSFT's weights back into the space that they are trained in, after each step of the optimizer.

    PEFT projects the gradients, but AdamW's steps are no multiples of these.
    """

    @torch.no_grad()
    def on_optimizer_step(self, *_: Any, **named: Any) -> None:
        """Take out of both factors what lies along the kept directions."""
        for layer in named["model"].modules():
            if isinstance(layer, OSFLayer):
                _put_back(layer)


def _put_back(layer: Any) -> None:
    """Project the factors of a layer: PEFT stores the kept directions, or all that are orthogonal to them."""
    for name, factors in layer.osf_svd_params.items():
        for side in ("U", "V"):
            low, start = factors[f"{side}_low"], getattr(layer, f"_osf_{side}_low_init")[name]
            kept = getattr(layer, f"_osf_{side}_high")
            space = next(iter(kept.values()), start)  # there is one adapter
            moved, space = (low - start, space) if side == "U" else ((low - start).t(), space.t())
            along = space @ (space.t() @ moved)
            moved = moved - along if name in kept else along
            low.copy_(start + (moved if side == "U" else moved.t()))


def _targets(
    targets: tuple[str, ...], layers: dict[str, Any], model: nn.Module, method: str
) -> tuple[list[str], list[str]]:
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
            f"{method}.targets {', '.join(strange)}: this model has no such linear layer; "
            f"allowed: {', '.join(sorted(known))}{also}; leave it empty for all linear layers"
        )
    return sorted(modules), parameters


def _experts(names: tuple[str, ...], model: nn.Module) -> list[str]:
    """Return `names` of fused parameters. Raises BadInput for one that the model does not have."""
    known = _fused(model)
    if strange := [name for name in names if not _ends(known, name)]:
        allowed = ", ".join(sorted({_last(name) for name in known})) or "none, it has no experts in one parameter"
        raise BadInput(
            f"lora.target_parameters {', '.join(strange)}: this model has no such weights of experts; "
            f"allowed: {allowed}"
        )
    return list(names)


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


def _all_linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head}


def _linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the linear layers but the head, by full name, that a matrix can stand beside.

    It is tried: not those that give more than a product (Llama 4's router), and not those whose weights the model reads
    without calling them (Mamba's time step), where the added matrices would have no effect.
    """
    layers = _all_linear_layers(model)
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
    method: str = "lora"

    def note(self) -> str | None:
        """Return the line that says what is not trained, or None."""
        if not self.left_out:
            return None
        left_out = ", ".join(self.left_out)
        return f"{self.method} stands beside {self.share:.0%} of the layers' weights, not beside {left_out}"


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Let `model` be its base within the block: adapters are passed by, and nothing drops out."""
    beside: list[Any] = [part for part in model.modules() if isinstance(part, BaseTunerLayer)]
    with mode_kept(model):
        model.eval()
        for part in beside:  # PEFT's own switch would also freeze what is trained, within the pass that trains it
            part._disable_adapters = True
        try:
            yield
        finally:
            for part in beside:
                part._disable_adapters = False


def quantised_note(methods: Methods) -> str | None:
    """Return the line that says beside which numbers the adapter is trained, None where they are the base's."""
    adapter = methods.adapter()
    if adapter is None or adapter.quantise is None:
        return None
    return (
        f"the base was held in {adapter.quantise} while it was trained: divergences on the way are those of the "
        "quantised model; what is saved is merged into the base's own weights, and measured as such"
    )


def trained_by(model: PreTrainedModel) -> Trained:
    """Return what the adapter in `model` trains."""
    beside = [part for part in model.modules() if isinstance(part, BaseTunerLayer)]
    method = "osft" if any(isinstance(part, OSFLayer) for part in beside) else "lora"
    adapted = {id(_adapted(part)) for part in beside}
    around = (model.get_output_embeddings(), *(part for part in model.modules() if isinstance(part, nn.Embedding)))
    outside = {id(parameter) for part in around if part is not None for parameter in part.parameters()}
    trained, total, left_out = 0, 0, Counter[str]()
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or ".lora_" in name or ".osf_" in name or id(parameter) in outside:
            continue
        numel = parameter.numel()
        total += numel
        if id(parameter) in adapted:
            trained += numel
        else:
            left_out[".".join(name.removesuffix(".weight").replace(".base_layer", "").split(".")[-2:])] += numel
    named = sorted(name for name, size in left_out.items() if size > SMALL * total)
    return Trained(trained / max(1, total), named, method)


def _adapted(layer: Any) -> Any:
    base: Any = layer.get_base_layer()
    return getattr(base, layer.parameter_name) if isinstance(layer, ParamWrapper) else base.weight


def merge_trained(methods: Methods, model: nn.Module, folder: Path, base: Path | None = None) -> PreTrainedModel:
    """Return the plain transformers model that computes what `model` does; write the adapter to `folder`/adapter.

    Where the base's layers were rounded for the training, the adapter is merged into those in folder `base`.

    The adapter has the same bytes on every machine. PEFT's own save would add the base's path, its version and a model
    card, and list targets in the order of a set.
    """
    adapter = methods.adapter()
    if adapter is None:
        return cast(PreTrainedModel, model)
    adapted: Any = model
    (folder / FOLDER).mkdir(exist_ok=True)
    tensors = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / FOLDER / "adapter_model.safetensors", {"format": "pt"})
    config = adapted.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": None, "inference_mode": True, "task_type": "CAUSAL_LM"}
    for name in ("target_modules", "target_parameters"):
        config[name] = sorted(config[name]) if config.get(name) else None
    del config["peft_version"]
    write_json(folder / FOLDER / "adapter_config.json", config)
    if base:
        adapted = PeftModel.from_pretrained(load_model(base, "cpu", "float32"), str(folder / FOLDER))
    merged: PreTrainedModel = adapted.merge_and_unload()
    return merged
