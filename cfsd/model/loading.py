"""Models and tokenizers as the store holds them: loaded, cached for measuring, and saved."""

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from cfsd.errors import BadInput
from cfsd.machine import room_for_two, usual_precision
from cfsd.model.causal import check_predictions
from cfsd.model.folder import START, brief, payload_of, read_object, stored_formats
from cfsd.model.special_tokens import end_tokens_of
from cfsd.store.artifact import Artifact, Store


class Tokenization(NamedTuple):
    """How texts become tokens of a model, and which tokens begin and end a text."""

    tokenizer: PreTrainedTokenizerBase
    start: int
    eos_ids: tuple[int, ...]

    def end(self) -> list[int]:
        """Return the token that ends a document, the tokenizer's EOS if it is one of the eos ids; empty if none."""
        own: Any = self.tokenizer.eos_token_id
        return [own if own in self.eos_ids else self.eos_ids[0]] if self.eos_ids else []


def load_tokenization(folder: Path) -> Tokenization:
    """Return the tokenizer, the start token and the eos ids of the model in `folder`."""
    return Tokenization(load_tokenizer(folder), read_start_token(folder), read_eos_ids(folder))


def read_start_token(folder: Path) -> int:
    """Return the start token of the model in `folder`. Raises BadInput."""
    token = read_object(folder / START).get("start_token")
    if type(token) is not int:
        raise BadInput(f"{folder / START} has start_token {token!r}, which is not a token's id; correct or delete it")
    return token


def read_eos_ids(folder: Path) -> tuple[int, ...]:
    """Return the ids at which the model ends a text: generation_config's, else the config's, else none."""
    return next(iter(end_tokens_of(folder).values()), ())


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer in `folder`."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        own = max(tokenizer.get_vocab().values(), default=0)
        tokenizer.encode(tokenizer.decode([own]))  # some mistakes show in use; other texts it may rightly refuse
    except Exception as error:  # whatever a broken file makes of another library
        alone = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
        remedy = "copy the tokenizer files again"
        if alone and find_spec("sentencepiece") is None:
            remedy = "tokenizer.model alone is read with more packages: pip install sentencepiece protobuf"
        raise BadInput(f"the tokenizer in {folder} cannot be loaded ({brief(error)}); {remedy}") from error
    return tokenizer


_loaded: dict[tuple[Path, str, str], PreTrainedModel] = {}


def load_for_measuring(store: Store, model: Artifact, device: str) -> PreTrainedModel:
    """Return the model in evaluation mode. Where memory allows the last two stay loaded: they are measured in turn."""
    place = (store.path(model), model.content, device)
    if place not in _loaded:
        while _loaded and (len(_loaded) > 1 or not room_for_two(_size(next(iter(_loaded.values()))), device)):
            _loaded.pop(next(iter(_loaded)))
            _return_memory()
        loaded = load_model(place[0], device).eval().requires_grad_(False)
        check_predictions(loaded, place[0])
        _loaded[place] = loaded
    return _loaded[place]


def release_models() -> None:
    """Give back the memory of the models that stayed loaded; another process is about to need it."""
    _loaded.clear()
    _return_memory()


def _size(model: PreTrainedModel) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _return_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_model(folder: Path, device: str, precision: str | None = None) -> PreTrainedModel:
    """Return the model in `folder` on `device`; precision empty: bfloat16 on GPUs that compute in it, else float32."""
    quiet()
    dtype = getattr(torch, precision or usual_precision(device))
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=False, use_safetensors=True
    )
    loaded.config.return_dict = True  # some old configs ask for tuples
    model: PreTrainedModel = loaded.to(device)
    return model


def skeleton(folder: Path) -> PreTrainedModel | None:
    """Return the model in `folder` without numbers, on torch's device `meta`; None of a class that asks for some."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except (RuntimeError, NotImplementedError):
        return None
    return model


def load_quantised(folder: Path, device: str, kind: str, computed_in: torch.dtype) -> PreTrainedModel:
    """Return the model in `folder` with its linear layers but the head in 4 bits, `nf4` or `fp4`, by bitsandbytes.

    The rest is float32; products are `computed_in` that format. Source: Dettmers et al. 2023, arXiv:2305.14314.
    """
    quiet()
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=computed_in
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config, device_map={"": device}, trust_remote_code=False,
        use_safetensors=True,
    )  # fmt: skip
    model.config.return_dict = True
    layers: Any = model.modules()
    for layer in layers:
        if hasattr(layer, "support_avx512bf16_for_cpu"):  # evaluation would round otherwise than training
            layer.support_avx512bf16_for_cpu = False
    return model


def halve_layers(model: PreTrainedModel) -> None:
    """Hold the frozen matrices of linear layers in bfloat16: the same function under autocast, which casts them anyway.

    Embeddings, also where they are the output layer, norms and biases stay as they are.
    """
    embeddings = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    for layer in model.modules():
        if type(layer) is nn.Linear and id(layer.weight) not in embeddings and not layer.weight.requires_grad:
            layer.weight.data = layer.weight.data.bfloat16()


def quiet() -> None:
    """Keep progress bars and warnings of transformers off the terminal, which shows our own."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _in_format(tensor: Tensor, number: str | None) -> Tensor:
    return tensor.to(getattr(torch, number)) if number and tensor.is_floating_point() else tensor


def save_model(model: PreTrainedModel, base_folder: Path, folder: Path) -> None:
    """Write each tensor of `model` in the number format that it has in its base, with all other files of the base."""
    formats = stored_formats(base_folder)
    for name, tensor in model.named_parameters():  # a tied one is listed once, and stays tied
        tensor.data = _in_format(tensor.data, formats.of(name))
    for name, buffer in model.named_buffers():
        buffer.data = _in_format(buffer.data, formats.by_tensor.get(name))
    model.save_pretrained(folder)
    if model.config.dtype != (most := getattr(torch, formats.most)):  # it is that of the first tensor
        model.config.dtype = most
        model.config.save_pretrained(folder)
    for name, path in payload_of(base_folder).items():
        if "safetensors" not in name and not (folder / name).exists():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / name)
