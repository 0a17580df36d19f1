"""What the files of a model folder show without loading it: which belong to the model, and whether they are whole."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from cfsd.errors import BadInput
from cfsd.model.adapter_folder import check_whole
from cfsd.model.architecture import refusal

CONFIG, GENERATION = "config.json", "generation_config.json"
START = "start_token.json"  # part of the content: another start token gives another distribution
TENSORS = "*.safetensors"
PAYLOAD = (TENSORS, "*.safetensors.index.json", "config.json", "generation_config.json", START,
           "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
           "chat_template*", "additional_chat_templates/*.jinja", "spiece.model")  # fmt: skip
UNREAD = ("*/*.safetensors", "consolidated*.safetensors")  # weights once more, in forms that transformers does not read
TEKKEN = "tekken.json"
QUANTISED = "quantize_config.json"  # of GPTQ's first tools
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
FORMATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}  # of weights that can be trained
POINTER = b"version https://git-lfs"  # how a file of Git LFS begins where its content was not fetched
ROUNDED_AWAY = 0.1  # the share of a training that the number format may take back without a word
MAX_NAMED = 4  # files or tensors in one message


def has_chat_template(folder: Path) -> bool:
    """Say whether the tokenizer in `folder` has a chat template."""
    settings = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").exists() or (
        settings.exists() and bool(json.loads(settings.read_text(encoding="utf-8")).get("chat_template"))
    )


def payload_of(folder: Path, *, weights: bool = True) -> dict[str, Path]:
    """Return the files that make the model in `folder`, by their path in it; `weights` false: they are not there yet.

    Raises BadInput if it is not a model, or an adapter.
    """
    if not folder.is_dir():
        raise BadInput(
            f"model {str(folder)!r} is not a folder{_what_it_is(folder)} (working directory {Path.cwd()}); allowed: "
            "a folder with a transformers model, `org/name@revision`, `smollm2` or `tiny`"
        )
    check_whole(folder)
    found = [path for pattern in PAYLOAD for path in sorted(folder.glob(pattern))]
    if dangling := [path for path in found if path.is_symlink() and not path.exists()]:
        raise BadInput(
            f"{dangling[0]} is a link to {dangling[0].readlink()}, which does not exist; copy the whole model"
        )
    unread = {path for pattern in UNREAD for path in folder.glob(pattern)}
    files = {path.relative_to(folder).as_posix(): path for path in found if path.is_file() and path not in unread}
    if "config.json" not in files or (weights and not any(folder.glob(TENSORS))):
        raise BadInput(
            f"{str(folder)!r} is not a model: config.json and *.safetensors are needed "
            f"(weights in pickle files are never read; save them with save_pretrained){_models_below(folder)}"
        )
    if not any(name.startswith(("tokenizer", "vocab", "spiece")) for name in files):
        but = f" but {TEKKEN}, which is Mistral's own format and is not read" if (folder / TEKKEN).exists() else ""
        remedy = "copy the tokenizer files of the model it was tuned from"
        raise BadInput(f"{str(folder)!r} has no tokenizer{but}; {remedy}")
    return files


def _what_it_is(path: Path) -> str:
    if not path.is_file():
        return ""
    if path.suffix == ".gguf":
        return " but a GGUF file, made for llama.cpp: take the transformers model that it was converted from"
    return f" but a file: give the folder that it is in, {str(path.parent)!r}"


def _models_below(folder: Path) -> str:
    below = sorted(str(path.parent) for path in folder.glob("*/config.json"))
    return f"; there is a model in {listed(below)}: give that folder" if below else ""


def check_files(folder: Path, *, weights: bool = True) -> None:
    """Check what the files of a model show without loading it; `weights` false: they are not there yet.

    Raises:
        BadInput: for quantised weights, an encoder with decoder, and files that are absent, cut short
            or at odds with each other.
    """
    _check_config(folder, read_object(folder / "config.json"))
    for name in payload_of(folder, weights=weights):
        if name.endswith(".json"):
            read_object(folder / name)
    for name in (CONFIG, GENERATION):
        for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids_in(folder / name, role)
    if weights:
        _check_weight_files(folder)


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a model. Raises BadInput naming the file and what is wrong."""
    try:
        content = path.read_bytes()
        value = json.loads(content.decode())  # as other libraries read it: UTF-8 without a byte order mark
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}); copy the model again") from error
    except (ValueError, RecursionError) as error:
        if content.startswith(POINTER):
            raise BadInput(f"{path} is {_POINTER_SAID}") from error
        what = "is empty" if not content.strip() else f"is not valid JSON ({error})"
        raise BadInput(f"{path} {what}; copy it again") from error
    if not isinstance(value, dict):
        raise BadInput(f"{path} holds {json.dumps(value):.40} where a JSON object is expected; copy it again")
    return value


_POINTER_SAID = "a Git LFS pointer, not the file itself: run `git lfs pull` in the model's repository"


def ids_in(file: Path, name: str) -> tuple[int, ...]:
    """Return the ids that a config names in a field such as `eos_token_id`; none without the file. Raises BadInput."""
    value = read_object(file).get(name) if file.exists() else None
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for number in ids:
        if type(number) is not int:
            raise BadInput(f"{name} {value!r} in {file} is not a token's id; allowed: whole numbers from 0; correct it")
    return tuple(ids)


def _check_config(folder: Path, config: dict[str, Any]) -> None:
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise BadInput(
            f"{folder / 'config.json'} has model_type {kind!r}, so nobody knows which architecture this is; copy the "
            "model's own config.json"
        )
    settings = config.get("quantization_config") or config.get("quantization")  # the second is MLX's
    if quantised := settings or ({"quant_method": "gptq"} if (folder / QUANTISED).exists() else None):
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
        raise BadInput(
            f"model {str(folder)!r} has quantised weights ({method}), which cannot be fine-tuned here; take the "
            "unquantised model it was made from"
        )
    number = config.get("dtype") or config.get("torch_dtype") or "float32"
    if number not in FORMATS.values():
        raise BadInput(
            f"{folder / 'config.json'} has dtype {number!r}; allowed: {', '.join(FORMATS.values())}; correct it, or "
            "take it out"
        )
    if why := refusal(config):
        raise BadInput(
            f"model {str(folder)!r} is of type {kind!r}: {why}; allowed are the other decoders that transformers "
            "knows, such as Llama, Qwen, Gemma or GPT-2"
        )
    if config.get("is_encoder_decoder"):
        raise BadInput(
            f"model {str(folder)!r} is of type {kind!r}, an encoder with a decoder; allowed are "
            "causal language models such as Llama, Qwen, Gemma or GPT-2"
        )


def weight_files(folder: Path) -> list[Path]:
    """Return the files from which transformers takes the weights: model.safetensors, else those of its index.

    Raises:
        BadInput: if there is neither, or if the index names a file that is not there.
    """
    if (folder / INDEX).is_file():
        index = folder / INDEX
        places = read_object(index).get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
            raise BadInput(f"{index} has no `weight_map` from tensors to files; copy it again")
        named = sorted(set(places.values()))
        if absent := [name for name in named if Path(name).name != name or not (folder / name).is_file()]:
            raise BadInput(f"{index} names {listed(absent)}, which the folder does not hold; copy the whole model")
        if not (folder / WEIGHTS).is_file():
            return [folder / name for name in named]
    if not (folder / WEIGHTS).is_file():
        raise BadInput(
            f"{str(folder)!r} holds {listed(sorted(path.name for path in folder.glob('*.safetensors')))}, but neither "
            f"{WEIGHTS} nor {INDEX}, one of which transformers reads; copy the whole model"
        )
    return [folder / WEIGHTS]


def _check_weight_files(folder: Path) -> None:
    files = weight_files(folder)
    names = {name: file for file in files for name in _checked_tensors(file)}
    layers = _layers(read_object(folder / "config.json"))
    if layers > len(names):
        raise BadInput(
            f"{folder / 'config.json'} describes {layers} layers, but the weights are {len(names)} tensors; "
            "config.json and weights are of different models: copy the model again"
        )
    if files == [folder / WEIGHTS]:
        return
    places: dict[str, str] = read_object(folder / INDEX)["weight_map"]
    astray = sorted(name for name, place in places.items() if name not in names or names[name].name != place)
    if astray := astray or sorted(set(names) - set(places)):
        raise BadInput(
            f"{folder / INDEX} and the files do not agree about {listed(astray)}: shards of different models, or an "
            "index of another one; copy the whole model again"
        )


def _layers(config: dict[str, Any]) -> int:
    counts = [config.get(name) for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers")]
    return max([count for count in counts if type(count) is int], default=0)


def _checked_tensors(file: Path) -> Iterator[str]:
    """Yield the names of the tensors in a file. Raises BadInput for a damaged one, or numbers that are quantised."""
    with file.open("rb") as opened:
        if opened.read(len(POINTER)) == POINTER:
            raise BadInput(f"{file} is {_POINTER_SAID}")
    try:
        with safe_open(file, framework="numpy") as tensors:
            formats = {name: str(tensors.get_slice(name).get_dtype()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{file} is damaged or was cut short ({error}); copy it again") from error
    for name, number in formats.items():
        if number.startswith(("F8", "F4", "F6_")) or (number in ("I8", "U8", "I4") and name.endswith("weight")):
            raise BadInput(
                f"{file} holds {name} as {number}: quantised weights, which cannot be fine-tuned here; take the "
                "unquantised model it was made from"
            )
        yield name


def count_parameters(folder: Path) -> int:
    """Return how many numbers the weights in `folder` hold, from the files' headers alone."""
    return sum(size for _, _, size in _headers(folder))


class StoredFormats(NamedTuple):
    """The number formats of a model's weights, such as `bfloat16`, whatever its config says."""

    most: str  # of most of the numbers
    by_tensor: dict[str, str]

    def of(self, name: str) -> str:
        """Return the format in which a tensor is saved: routers and norms may be kept in more bits than the rest."""
        return self.by_tensor.get(name, self.most)

    def shortest(self) -> str:
        """Return the one with the fewest bits."""
        return min({self.most, *self.by_tensor.values()}, key=lambda name: (not name.endswith("16"), name))


def stored_formats(folder: Path) -> StoredFormats:
    """Return the formats of the weights in `folder`, from the files' headers alone."""
    numbers, by_tensor = Counter[str](), {}
    for name, number, size in _headers(folder):
        numbers[number] += size
        if number in FORMATS:
            by_tensor[name] = FORMATS[number]
    return StoredFormats(FORMATS[max(FORMATS, key=lambda name: numbers[name])], by_tensor)


def _headers(folder: Path) -> Iterator[tuple[str, str, int]]:
    """Yield the name, the number format and the numbers of each tensor."""
    for file in weight_files(folder):
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_slice(name)
                yield name, str(tensor.get_dtype()), math.prod(tensor.get_shape())


def listed(names: list[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def brief(error: Exception) -> str:
    """Return the beginning of what another library says of its failure, on one line."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said:.300}" if said else type(error).__name__
