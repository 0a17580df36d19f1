"""From which token a model writes unprompted, and at which tokens its texts end: one order of sources for both.

The files of a model and its tokenizer often disagree; which of them is taken is said wherever it is not plain.
"""

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoConfig, PreTrainedTokenizerBase

from cfsd.errors import BadInput
from cfsd.model.folder import CONFIG, GENERATION, START, ids_in, read_object
from cfsd.store.digests import write_json

SEPARATORS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|endofdocument|>",
    "<|end_of_document|>",
    "<eod>",
    "<|eod|>",
    "[EOD]",
)


def end_tokens_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the end tokens by the file that names them; the first of them counts. Raises BadInput."""
    found = {}
    for name in (GENERATION, CONFIG):
        if (folder / name).exists() and (ids := ids_in(folder / name, "eos_token_id")):
            found[name] = ids
    return found


def settle_end_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Make every file that names end tokens tell of a choice; return what is to be said of it.

    Where no file names one, the tokenizer's EOS goes into generation_config.json, which every reader asks first.
    """
    stored, own = end_tokens_of(folder), tokenizer.eos_token_id
    if stored:
        taken_from, taken = next(iter(stored.items()))
        others = {file: ids for file, ids in stored.items() if file != taken_from}
        others |= {} if own is None else {"the tokenizer": (int(own),)}
        odd = [f"{source} has {_named(tokenizer, ids)}" for source, ids in others.items() if not set(ids) <= set(taken)]
        return [f"end of a text: {_named(tokenizer, taken)}, from {taken_from}; {', '.join(odd)}"] if odd else []
    if own is None:
        return ["end of a text: none, neither the model's files nor its tokenizer name a token; texts end by length"]
    file = folder / GENERATION
    kept = read_object(file) if file.exists() else {}
    file.unlink(missing_ok=True)  # may be a link to the user's file
    write_json(file, kept | {"eos_token_id": int(own)})
    return [f"end of a text: {_named(tokenizer, [int(own)])}, the tokenizer's; the model's files name none"]


def settle_start_token(folder: Path, tokenizer: PreTrainedTokenizerBase, wanted: str | None) -> list[str]:
    """Write the start token beside the model; return what is to be said of it. Raises BadInput."""
    file = folder / START
    if wanted is None and file.exists():
        return []
    token, said = start_token(folder, tokenizer, wanted)
    file.unlink(missing_ok=True)  # may be a link to the user's file
    write_json(file, {"start_token": token})
    return said


def start_token(folder: Path, tokenizer: PreTrainedTokenizerBase, wanted: str | None = None) -> tuple[int, list[str]]:
    """Return the id of the token from which the model writes unprompted, and what is to be said of it.

    The order: `wanted`, the config's BOS, the tokenizer's BOS, a document separator, EOS. Models without BOS (OLMo,
    GPT-NeoX, Qwen) were trained on documents that one token separates; a chat model's EOS often ends turns instead.
    Raises BadInput if there is none, or if `wanted` is not one token of the vocabulary.
    """
    if wanted is not None:
        return _wanted(tokenizer, wanted), []
    of_config, said = _bos_of_config(folder, tokenizer)
    own, separator = tokenizer.bos_token_id, _separator(tokenizer)
    known = [
        (of_config, f"{CONFIG}'s bos_token_id"),
        (own, "the tokenizer's BOS"),
        (separator, "the document separator"),
        (tokenizer.eos_token_id, "EOS"),
    ]
    for token, source in known:
        if token is not None:
            plain = token == own and not said
            return int(token), [] if plain else [_said(tokenizer, int(token), source, own, said)]
    raise BadInput(
        "this model's tokenizer has neither BOS nor EOS, so it is unknown where its documents begin; "
        "set base.start_token to the token that began or separated the documents it was trained on"
    )


def _wanted(tokenizer: PreTrainedTokenizerBase, wanted: str) -> int:
    token = tokenizer.get_vocab().get(wanted)  # what the tokenizer makes of a token that it lacks may be this very one
    if token is None:
        raise BadInput(
            f"start_token {wanted!r} is not a token of this model's vocabulary; give one as the tokenizer writes it, "
            "such as '<s>', or leave start_token out"
        )
    return token


def _bos_of_config(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, str]:
    """Return the config's BOS if a text can begin with it, else None and why not."""
    file = folder / CONFIG
    token = next(iter(ids_in(file, "bos_token_id")), None)
    if token is None:
        return None, ""
    rows = vocabulary_rows(folder)
    if not 0 <= token < rows:
        raise BadInput(
            f"bos_token_id {token} in {file} is outside the model's vocabulary of {rows} tokens; correct it there "
            f"(the tokenizer has {tokenizer.bos_token_id}), or set base.start_token"
        )
    own, name = tokenizer.bos_token_id, _named(tokenizer, [token])
    if token not in special_ids(tokenizer):
        return None, f"{CONFIG} has {name}, which is ordinary text"
    if own is not None and token != own and token in (tokenizer.pad_token_id, tokenizer.unk_token_id):
        return None, f"{CONFIG} has {name}, which pads or replaces"
    return token, "" if own in (None, token) else f"the tokenizer has {_named(tokenizer, [own])}"


def _separator(tokenizer: PreTrainedTokenizerBase) -> int | None:
    special = special_ids(tokenizer)
    ids = (tokenizer.get_vocab().get(name) for name in SEPARATORS)
    return next((number for number in ids if number in special), None)


def _said(tokenizer: PreTrainedTokenizerBase, token: int, source: str, own: int | None, said: str) -> str:
    why = said or ("" if own is not None else "the tokenizer has no BOS")
    line = f"start of a text: {_named(tokenizer, [token])}, {source}" + (f"; {why}" if why else "")
    if _ends_turns(tokenizer, token):
        line += "; the chat template ends turns with it, so set base.start_token if another one separated documents"
    return line


def _ends_turns(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    template = str(tokenizer.chat_template or "")
    text = str(tokenizer.convert_ids_to_tokens(token))
    return token != tokenizer.bos_token_id and (
        text in template or ("eos_token" in template and token == tokenizer.eos_token_id)
    )


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of the tokens that no ordinary text becomes."""
    return set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)


def vocabulary_rows(folder: Path) -> int:
    """Return how many rows the model's embedding has."""
    return int(AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config().vocab_size)


def check_start(folder: Path, name: str, start: int) -> None:
    """Raise BadInput for a start token beyond the embedding."""
    if not 0 <= start < (rows := vocabulary_rows(folder)):
        raise BadInput(
            f"start token {start} of the model in {name!r} is outside its vocabulary of {rows} tokens; "
            f"set base.start_token, or correct {START} if the folder has one"
        )


def check_ids(folder: Path, name: str, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int]) -> None:
    """Check that tokenizer and end tokens fit the model's embedding.

    Raises:
        BadInput: for ids beyond the embedding, and where every end token is ordinary text.
    """
    rows, vocabulary = vocabulary_rows(folder), _vocabulary(folder, tokenizer)
    if not vocabulary:
        raise BadInput(f"the tokenizer in {name!r} has no tokens; copy the files of the model's own tokenizer")
    vocabulary |= {f"added to every text: {number}": number for number in tokenizer.encode("")}
    token, largest = max(vocabulary.items(), key=lambda entry: entry[1])
    if largest >= rows:
        raise BadInput(
            f"the tokenizer in {name!r} has the token {token!r} with id {largest}, but the model's embedding "
            f"has {rows} rows; call resize_token_embeddings({largest + 1}), train and save, or use the tokenizer "
            "that belongs to the model"
        )
    if outside := [number for number in eos_ids if not 0 <= number < rows]:
        raise BadInput(
            f"eos_token_id {outside[0]} of the model in {name!r} is outside its vocabulary of {rows} tokens; "
            f"correct it in generation_config.json and config.json (the tokenizer has {tokenizer.eos_token_id})"
        )
    if eos_ids and not special_ids(tokenizer) & set(eos_ids):
        raise BadInput(
            f"eos_token_id of the model in {name!r} is the ordinary token "
            f"{_named(tokenizer, eos_ids)}: texts would end in their middle; "
            f"correct it in generation_config.json and config.json (the tokenizer has {tokenizer.eos_token_id})"
        )


def _vocabulary(folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the tokens in the tokenizer's files; some classes add a default one that no text becomes."""
    if not (folder / "tokenizer.json").exists():
        return tokenizer.get_vocab()
    stored = read_object(folder / "tokenizer.json")
    entries = stored["model"].get("vocab", {})  # a mapping, or pairs of token and score (unigram)
    known = {entry if isinstance(entry, str) else entry[0] for entry in entries}
    known |= {token["content"] for token in stored.get("added_tokens", [])}
    return {token: number for token, number in tokenizer.get_vocab().items() if token in known}


def _named(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    def token(number: int) -> str:
        return repr(tokenizer.convert_ids_to_tokens(number)) if 0 <= number < len(tokenizer) else "no token"

    return ", ".join(f"{number} ({token(number)})" for number in ids)
