"""Whether a model is a whole, usable causal language model: its tensors, its tokens, its predictions.

`cfsd.model.checkpoint` checks what its files show without transformers.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cfsd.errors import BadInput

MAX_NAMED = 4  # tensors named in one message
PROBE_TOKENS = 8
MAX_CHANGE = 1e-2  # of the logits' deviation: what rounding may change at an earlier position


def check_weights(folder: Path, name: str) -> None:
    """Check that the tensors in `folder` are those of the architecture, as transformers maps their names.

    Tied heads, buffers and renamed layers are known by the model class. On the device `meta` no weight is read.

    Raises:
        BadInput: for a model that is no decoder, and for tensors that are missing, unexpected or of another shape.
    """
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise BadInput(
            f"model {name!r} is of type {kind!r}, which is not a causal language model; allowed are decoders "
            "that transformers' AutoModelForCausalLM knows, such as Llama, Qwen, Gemma or GPT-2"
        )
    loading, faults = _loading_info(folder, name), []
    if missing := sorted(loading["missing_keys"]):
        faults.append(f"lacks {_listed(missing)}")
    if unexpected := sorted(loading["unexpected_keys"]):
        faults.append(f"holds {_listed(unexpected)}, which its architecture does not have")
    if mismatched := sorted(loading["mismatched_keys"]):
        shapes = [f"{key} {tuple(stored)} where {tuple(wanted)} is needed" for key, stored, wanted in mismatched]
        faults.append(f"holds {_listed(shapes)}")
    if faults:
        raise BadInput(
            f"model {name!r} {' and '.join(faults)}: transformers would fill such weights with random "
            f"numbers, anew at each load; {_remedy(missing, unexpected)}"
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
    except (ValueError, OSError, KeyError, RuntimeError, ImportError, AttributeError) as error:
        raise BadInput(f"the model in {name!r} cannot be loaded by transformers: {error}") from error
    found: dict[str, Any] = loading
    return found


def _remedy(missing: list[str], unexpected: list[str]) -> str:
    """Return what to do; names that differ by a prefix alone come from a wrapped model that was saved."""
    for name in unexpected:
        for wanted in missing:
            if name != wanted and name.endswith(wanted):
                return f"the names begin with {name.removesuffix(wanted)!r}: save the inner model (save_pretrained)"
    return "save the whole model again with save_pretrained"


def check_ids(folder: Path, name: str, tokenizer: PreTrainedTokenizerBase, start: int, eos_ids: Sequence[int]) -> None:
    """Check that tokenizer, start token and end tokens fit the model's embedding.

    Raises:
        BadInput: for ids beyond the embedding, and where every end token is ordinary text.
    """
    rows = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config().vocab_size
    token, largest = max(_vocabulary(folder, tokenizer).items(), key=lambda entry: entry[1])
    if largest >= rows:
        raise BadInput(
            f"the tokenizer in {name!r} has the token {token!r} with id {largest}, but the model's embedding "
            f"has {rows} rows; call resize_token_embeddings({largest + 1}), train and save, or use the tokenizer "
            "that belongs to the model"
        )
    for role, ids in (("bos_token_id", [start]), ("eos_token_id", eos_ids)):
        for number in ids:
            if not 0 <= number < rows:
                raise BadInput(
                    f"{role} {number} of the model in {name!r} is outside its vocabulary of {rows} tokens; "
                    f"correct it in generation_config.json and config.json (the tokenizer has {tokenizer.eos_token_id})"
                )
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    if eos_ids and not special & set(eos_ids):
        raise BadInput(
            f"eos_token_id {', '.join(map(str, eos_ids))} of the model in {name!r} is the ordinary token "
            f"{', '.join(map(repr, tokenizer.convert_ids_to_tokens(list(eos_ids))))}: texts would end in their middle; "
            f"correct it in generation_config.json and config.json (the tokenizer has {tokenizer.eos_token_id})"
        )


def _vocabulary(folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the tokens in the tokenizer's files; some classes add a default one that no text becomes."""
    if not (folder / "tokenizer.json").exists():
        return tokenizer.get_vocab()
    stored = json.loads((folder / "tokenizer.json").read_text())
    entries = stored["model"].get("vocab", {})  # a mapping, or pairs of token and score (unigram)
    known = {entry if isinstance(entry, str) else entry[0] for entry in entries}
    known |= {token["content"] for token in stored.get("added_tokens", [])}
    return {token: number for token, number in tokenizer.get_vocab().items() if token in known}


@torch.no_grad()
def check_causal(model: PreTrainedModel, where: Path) -> None:
    """Check by two forward passes that a later token changes no earlier prediction.

    Raises:
        BadInput: if it does, as in BERT, which reads the whole text.
    """
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(vocabulary, (1, PROBE_TOKENS), generator=generator).to(model.device)
    other_BT = ids_BT.clone()
    other_BT[0, -1] = (ids_BT[0, -1] + 1) % vocabulary
    before, after = (model(input_ids=ids, use_cache=False).logits[0, :-1].float() for ids in (ids_BT, other_BT))
    if float((before - after).abs().max()) > MAX_CHANGE * float(before.std()):
        raise BadInput(
            f"the model in {str(where)!r} is not causal: its prediction at a token changes with the tokens after it, "
            "so it cannot write text; allowed are decoders such as Llama, Qwen, Gemma or GPT-2"
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
