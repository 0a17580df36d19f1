"""Whether a folder is a whole, usable causal language model: its tensors, their numbers, its architecture.

`cfsd.model.folder` checks what its files show without transformers, `cfsd.model.special_tokens` its ids.
"""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cfsd.errors import BadInput
from cfsd.model.folder import MAX_NAMED, brief, listed, read_object, weight_files

WITH_MASKS = ("gpt2", "gpt_neo", "gptj", "codegen")
MASK = re.compile(r"\.attn(\.attention)?\.(bias|masked_bias|causal_mask)$")  # no layer of these has a bias of its name
TEXT_MODEL = (  # saves the text model of a multimodal checkpoint, and its tokenizer
    "from transformers import AutoModelForImageTextToText as M, AutoModelForCausalLM as C, AutoTokenizer as T; "
    "m = M.from_pretrained({folder}); c = C.from_config(m.config.get_text_config(), dtype=m.dtype); "
    "c.base_model.load_state_dict(m.get_decoder().state_dict()); "
    "c.set_output_embeddings(m.get_output_embeddings()); c.generation_config = m.generation_config; "
    'c.save_pretrained("TEXT"); T.from_pretrained({folder}).save_pretrained("TEXT")'
)


def load_config(folder: Path, name: str) -> PretrainedConfig:
    """Return the config of the model in `folder`.

    Raises:
        BadInput: for one that transformers cannot read, a model that is no decoder, and a multimodal one.
    """
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a broken file makes of another library
        if "auto_map" in read_object(folder / "config.json"):
            raise BadInput(
                f"model {name!r} needs Python code that comes with it (auto_map in config.json), which is never "
                "executed; allowed: architectures that transformers knows by itself"
            ) from error
        raise BadInput(
            f"config.json of the model {name!r} cannot be used ({brief(error)}); correct it, or take a causal language "
            "model that this version of transformers knows by itself, such as Llama, Qwen, Gemma or GPT-2"
        ) from error
    _check_text(config, folder, name)
    pad, rows = getattr(config, "pad_token_id", None), config.vocab_size
    if pad is not None and pad >= rows:
        raise BadInput(
            f"pad_token_id {pad} in config.json of the model {name!r} is outside its vocabulary of {rows} tokens; "
            "correct it there, or take it out"
        )
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise BadInput(
            f"model {name!r} is of type {config.model_type!r}, which is not a causal language model; allowed are "
            "decoders that transformers' AutoModelForCausalLM knows, such as Llama, Qwen, Gemma or GPT-2"
        )
    return config


def _check_text(config: PretrainedConfig, folder: Path, name: str) -> None:
    try:
        text = config.get_text_config()
    except ValueError:  # several
        text = None
    if text is config:
        return
    remedy = "take a model of its family that reads text only"
    if isinstance(text, PretrainedConfig) and text.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        command = shlex.quote(TEXT_MODEL.format(folder=json.dumps(str(folder))))
        remedy = f"save its text model, and take the folder TEXT: python -c {command}"
    raise BadInput(f"model {name!r} is of type {config.model_type!r}, which reads more than text; {remedy}")


def _is_mask(key: str, folder: Path) -> bool:
    """Say whether a tensor is a constant of attention that old versions of transformers saved with the weights."""
    return bool(MASK.search(key)) and read_object(folder / "config.json").get("model_type") in WITH_MASKS


def check_weights(folder: Path, name: str) -> None:
    """Check that the tensors in `folder` are those of the architecture, as transformers maps their names.

    Tied heads, buffers and renamed layers are known by the model class. On the device `meta` no weight is read.

    Raises:
        BadInput: for tensors that are missing, unexpected or of another shape.
    """
    loading, faults = _loading_info(folder, name), []
    if missing := sorted(loading["missing_keys"]):
        faults.append(f"lacks {listed(missing)}")
    if unexpected := sorted(key for key in loading["unexpected_keys"] if not _is_mask(key, folder)):
        faults.append(f"holds {listed(unexpected)}, which its architecture does not have")
    if mismatched := sorted(loading["mismatched_keys"]):
        shapes = [f"{key} {tuple(stored)} where {tuple(wanted)} is needed" for key, stored, wanted in mismatched]
        faults.append(f"holds {listed(shapes)}")
    if faults:
        filled = "fill the weights with random numbers, anew at each load"
        would = filled if missing or mismatched else "leave them out, so that another model would be measured"
        raise BadInput(
            f"model {name!r} {' and '.join(faults)}: transformers would {would}; {_remedy(folder, missing, unexpected)}"
        )


def _loading_info(folder: Path, name: str) -> dict[str, Any]:
    """Return the keys that transformers finds missing, unexpected or of another shape."""
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        _, loading = load(
            folder,
            device_map={"": "meta"},
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:  # whatever a broken file makes of another library
        raise BadInput(
            f"the model in {name!r} cannot be loaded by transformers ({brief(error)}); correct config.json, or copy "
            "the model again"
        ) from error
    found: dict[str, Any] = loading
    return found


def _remedy(folder: Path, missing: list[str], unexpected: list[str]) -> str:
    """Return what to do; names that differ by a prefix alone come from a wrapped model that was saved."""
    for name in unexpected:
        for wanted in missing:
            if name != wanted and name.endswith(wanted):
                return f"the names begin with {name.removesuffix(wanted)!r}: save the inner model (save_pretrained)"
    config = read_object(folder / "config.json")
    named, causal = config.get("architectures"), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config["model_type"]]
    if isinstance(named, list) and named and named[0] != causal:
        return f"config.json says that a {named[0]} was saved, not a {causal}: take the language model it was made from"
    if not missing:
        return "correct config.json, or save the language model alone with save_pretrained"
    return "save the whole model again with save_pretrained"


def check_numbers(folder: Path, name: str) -> None:
    """Check that all weights are finite; reads every byte of them once.

    Raises:
        BadInput: naming the tensors that hold NaN or infinity.
    """
    bad = []
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(key)
                if tensor.is_floating_point() and not _finite(tensor):
                    bad.append(f"{key} in {file.name}")
                if len(bad) > MAX_NAMED:
                    break
    if bad:
        raise BadInput(
            f"model {name!r} has NaN or infinite numbers in {listed(bad)}: its training diverged or the file is "
            "damaged; take an earlier checkpoint, or copy it again"
        )


def _finite(tensor: torch.Tensor) -> bool:
    """Say whether all numbers are finite; their sum, which is quick, tells it unless it overflows."""
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())
