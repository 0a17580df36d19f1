"""An adapter merged into its base: a whole model that computes what the two compute together."""

import inspect
import re
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import LoraLayer
from pydantic import JsonValue
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from cfsd.errors import BadInput
from cfsd.model.adapter import Adapter
from cfsd.model.adapter_folder import ADAPTER_WEIGHTS
from cfsd.model.folder import brief, listed
from cfsd.model.loading import load_model, load_tokenizer, save_model
from cfsd.model.tokenizer_difference import differences

PROBE_TOKENS = 16
MAX_CHANGE = 1e-3  # of the logits' deviation: what float32 may change when two products become one
SIZES = re.compile(r"size mismatch for (\S+):.*?torch\.Size\((.*?)\).*?torch\.Size\((.*?)\)", re.S)


def merge(base: Path, adapter: Adapter, folder: Path) -> dict[str, JsonValue]:
    """Write the merged model, computed in float32 on the CPU and stored in the base's number format; return metadata.

    All files but the weights are the base's, the tokenizer too. That merging changes nothing that is computed is
    proved by a forward pass before and after it. Raises BadInput when the adapter does not fit the base in every
    tensor, or cannot be merged exactly.
    """
    adapter.check()
    said = _check_tokenizer(base, adapter)
    model = load_model(base, "cpu", "float32")
    with warnings.catch_warnings(action="ignore"):  # of PEFT, on names that it renames and ties that it loosens
        merged = _merged(_adapted(model, adapter), adapter)
        save_model(merged, base, folder)
    config = adapter.config()
    metadata: dict[str, JsonValue] = {
        "adapter": adapter.label(),
        "adapter_type": config["peft_type"],
        "adapter_rank": config.get("r"),
        "adapter_base": adapter.named_base(),
        "parameters": sum(parameter.numel() for parameter in merged.parameters()),
    }
    return metadata | {"said": [*said]}


def _adapted(model: PreTrainedModel, adapter: Adapter) -> Any:
    weights = load_file(Path(adapter.path) / ADAPTER_WEIGHTS)
    config = _config(adapter)
    _check_numbers(weights, adapter)
    _check_vocabulary(model, weights, adapter)
    try:
        adapted = get_peft_model(model, config)
        own = _own_names(adapted)
        loaded: Any = set_peft_model_state_dict(adapted, weights)
    except Exception as error:  # whatever a tensor that does not fit makes of another library
        raise BadInput(f"adapter {adapter.path!r} does not fit the base: {_said(error)}; {_remedy(adapter)}") from error
    if unexpected := sorted(loaded.unexpected_keys):
        raise BadInput(f"adapter {adapter.path!r} holds {listed(unexpected)}, which the base lacks; {_remedy(adapter)}")
    absent = set(loaded.missing_keys)
    if missing := sorted(names[0] for names in own if absent.issuperset(names)):
        raise BadInput(f"adapter {adapter.path!r} lacks {listed(missing)}; save it again, or copy the whole folder")
    _loosen_ties(adapted, config)
    return adapted.eval()


def _own_names(adapted: PeftModel) -> list[list[str]]:
    """Return the names of each tensor of the adapter; one that layers share has several, and is stored under one."""
    names: dict[int, list[str]] = {}
    for name, parameter in adapted.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(id(parameter), []).append(name)
    return [*names.values()]


def _config(adapter: Adapter) -> PeftConfig:
    """Return PEFT's config. PEFT leaves out settings that it does not know with a mere warning; we do not."""
    settings = adapter.config()
    kind, here = settings["peft_type"], f"PEFT {version('peft')}"
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise BadInput(f"adapter {adapter.path!r} is of type {kind}, which {here} does not know; allowed are LoRA "
                       "and its kin")  # fmt: skip
    known = inspect.signature(PEFT_TYPE_TO_CONFIG_MAPPING[kind].__init__).parameters
    if strange := sorted(name for name, value in settings.items() if value and name not in known):
        raise BadInput(
            f"adapter {adapter.path!r} has settings that {here} does not know ({listed(strange)}), so it would compute "
            f"something else; it was written by PEFT {settings.get('peft_version') or 'of another version'}: merge it "
            "there, and give the whole model"
        )
    try:
        config: PeftConfig = PeftConfig.from_pretrained(adapter.path)
    except Exception as error:  # whatever a wrong value makes of it
        raise BadInput(f"adapter_config.json of {adapter.path!r} cannot be used: {brief(error)}; correct it") from error
    config.inference_mode = False  # so that the adapter's own tensors are those that require gradients
    return config


def _loosen_ties(adapted: Any, config: Any) -> None:
    """Give the head weights of its own, where LoRA changes either it or the embedding to which it is tied.

    Merged into the shared weights, a change of one would change the other too. An adapter may also hold the weights
    that the two share, so they come first.
    """
    parts: list[Any] = [adapted.get_output_embeddings(), adapted.get_input_embeddings()]
    changed = [isinstance(part, LoraLayer) for part in parts]
    head, embedding = (part.get_base_layer() if lora else part for part, lora in zip(parts, changed, strict=True))
    tied = head is not None and head.weight is embedding.weight
    if tied and any(changed) and not getattr(config, "ensure_weight_tying", False):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        for part in (adapted.config, adapted.config.get_text_config()):
            part.tie_word_embeddings = False


@torch.no_grad()
def _merged(adapted: Any, adapter: Adapter) -> PreTrainedModel:
    """Return the plain model. Raises BadInput if it does not compute what base and adapter do."""
    kind = adapter.config()["peft_type"]
    if not hasattr(adapted, "merge_and_unload"):
        raise BadInput(f"adapter {adapter.path!r} of type {kind} cannot be merged; allowed: LoRA and its kin")
    try:
        before = _logits(adapted)
        merged: PreTrainedModel = adapted.merge_and_unload().eval()
    except Exception as error:  # kinds of adapters that PEFT cannot merge raise what they like
        raise BadInput(f"adapter {adapter.path!r} of type {kind} cannot be merged: {brief(error)}") from error
    change = float((_logits(merged) - before).abs().max())
    if not change <= MAX_CHANGE * float(before.std()):
        raise BadInput(
            f"adapter {adapter.path!r} of type {kind} cannot be merged exactly: the merged model's logits differ by "
            f"{change:.2g} from those of base and adapter together; allowed are adapters that are a change of weights"
        )
    return merged


def _logits(model: Any) -> Tensor:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids_BT = torch.randint(vocabulary, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    logits: Tensor = model(input_ids=ids_BT, use_cache=False).logits
    return logits


def _check_numbers(weights: dict[str, Tensor], adapter: Adapter) -> None:
    if bad := sorted(name for name, tensor in weights.items() if not torch.isfinite(tensor).all()):
        raise BadInput(
            f"adapter {adapter.path!r} holds NaN or infinity in {listed(bad)}: its training diverged; take an earlier "
            "checkpoint"
        )


def _check_vocabulary(model: PreTrainedModel, weights: dict[str, Tensor], adapter: Adapter) -> None:
    embedding: Any = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    names = {name for name, module in model.named_modules() if module in (embedding, model.get_output_embeddings())}
    for key, tensor in weights.items():
        if any(key.endswith(f"{name}.weight") for name in names) and tensor.shape[0] != rows:
            raise BadInput(
                f"adapter {adapter.path!r} was trained with {tensor.shape[0]} tokens and the base has {rows}; a "
                "divergence between them is not defined: measure against the base with the same tokens added"
            )


def _check_tokenizer(base: Path, adapter: Adapter) -> list[str]:
    """Return what is to be said of a tokenizer beside the adapter. Raises BadInput where its tokens are others."""
    folder = Path(adapter.path)
    if not any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
        return []
    own, theirs = load_tokenizer(folder), load_tokenizer(base)
    if different := sorted(set(own.get_vocab().items()) ^ set(theirs.get_vocab().items())):
        token, number = different[0]
        raise BadInput(
            f"the tokenizer in adapter {adapter.path!r} is not the base's: they differ in {len(different)} tokens, "
            f"such as {token!r} ({number}); a divergence between them is not defined: measure against the base it was "
            "trained from, with the same tokens added"
        )
    if changed := differences(own, theirs):
        return [f"adapter {adapter.label()} has another {', '.join(changed)} in its tokenizer; the base's is used"]
    return []


def _said(error: Exception) -> str:
    """Return what does not fit; torch's list of shapes in one line."""
    shapes = [f"{name} has the shape ({own}) where ({base}) is needed" for name, own, base in SIZES.findall(str(error))]
    return listed(shapes).replace("([", "(").replace("])", ")") if shapes else brief(error)


def _remedy(adapter: Adapter) -> str:
    named = adapter.named_base()
    return f"it was trained on {named!r}: give that model as the base" if named else "give the base it was trained on"
