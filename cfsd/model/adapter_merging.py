"""An adapter merged into its base: a whole model that computes what the two compute together."""

import warnings
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from pydantic import JsonValue
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from cfsd.errors import BadInput
from cfsd.model.adapter import WEIGHTS, Adapter
from cfsd.model.loading import load_model, load_tokenizer, save_model

NAMED = 3  # tensors named in one message


def merge(base: Path, adapter: Adapter, folder: Path, device: str) -> dict[str, JsonValue]:
    """Write the merged model, computed in float32 and stored in the number format of the base; return its metadata.

    All files but the weights are the base's. Raises BadInput when the adapter does not fit the base in every tensor.
    """
    adapter.check()
    _check_tokenizer(base, adapter)
    model = load_model(base, device, "float32")
    with warnings.catch_warnings(action="ignore"):  # of PEFT, on names that it renames and ties that it loosens
        adapted = _adapted(model, adapter)
        if not hasattr(adapted, "merge_and_unload"):
            kind = adapter.config().get("peft_type")
            raise BadInput(f"adapter {adapter.path!r} of type {kind} cannot be merged; allowed: LoRA and its kin")
        save_model(adapted.merge_and_unload(), base, folder)
    config = adapter.config()
    return {"adapter": adapter.label(), "adapter_type": config.get("peft_type"), "rank": config.get("r")}


def _adapted(model: PreTrainedModel, adapter: Adapter) -> Any:
    weights = load_file(Path(adapter.path) / WEIGHTS)
    _check_vocabulary(model, weights, adapter)
    try:
        config = PeftConfig.from_pretrained(adapter.path)
        config.inference_mode = False  # so that the adapter's own tensors are those that require gradients
        adapted: PeftModel = get_peft_model(model, config)  # type: ignore[assignment]
        own = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
        loaded: Any = set_peft_model_state_dict(adapted, weights)
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise BadInput(f"adapter {adapter.path!r} does not fit the base: {error}; {_remedy(adapter)}") from error
    if unexpected := sorted(loaded.unexpected_keys):
        raise BadInput(
            f"adapter {adapter.path!r} holds {_listed(unexpected)}, which the base lacks; {_remedy(adapter)}"
        )
    if missing := sorted(own & set(loaded.missing_keys)):
        raise BadInput(f"adapter {adapter.path!r} lacks {_listed(missing)}; save it again, or copy the whole folder")
    return adapted


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


def _check_tokenizer(base: Path, adapter: Adapter) -> None:
    if not (Path(adapter.path) / "tokenizer_config.json").is_file():
        return
    own, theirs = load_tokenizer(Path(adapter.path)).get_vocab(), load_tokenizer(base).get_vocab()
    if different := sorted(set(own.items()) ^ set(theirs.items())):
        token, number = different[0]
        raise BadInput(
            f"the tokenizer in adapter {adapter.path!r} is not the base's: they differ in {len(different)} tokens, "
            f"such as {token!r} ({number}); a divergence between them is not defined: measure against the base it was "
            "trained from, with the same tokens added"
        )


def _remedy(adapter: Adapter) -> str:
    named = adapter.config().get("base_model_name_or_path")
    return f"it was trained on {named!r}: give that model as the base" if named else "give the base it was trained on"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
