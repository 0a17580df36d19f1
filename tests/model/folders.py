"""Changes of a model's folder, as people make them by accident."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken

from cfsd.model.loading import load_tokenizer

Tensors = dict[str, torch.Tensor]


def write_config(folder: Path, **changes: Any) -> None:
    """Change config.json and generation_config.json alike."""
    for name in ("config.json", "generation_config.json"):
        change_json(folder / name, **changes)


def change_json(file: Path, **changes: Any) -> None:
    """Change fields of a JSON object; None is written, `...` removes the field."""
    kept = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in kept.items() if value is not ...}))


def write_weights(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Change the tensors of a model with one file."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def without(tensors: Tensors, name: str) -> Tensors:
    """Return the tensors but one."""
    return {key: value for key, value in tensors.items() if key != name}


def in_shards(folder: Path) -> dict[str, str]:
    """Divide the weights into two files with an index; return the places of the tensors."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / file, metadata={"format": "pt"})
    places = {name: file for file, held in shards.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return places


def give_special_tokens(folder: Path, *names: str, resize: bool = True, **roles: str | None) -> None:
    """Add special tokens to tokenizer and, with `resize`, to the embedding; set roles such as bos_token."""
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens([AddedToken(name, special=True) for name in names], special_tokens=True)
    for role, name in roles.items():
        setattr(tokenizer, role, name)
    tokenizer.save_pretrained(folder)
    if resize and names:
        write_weights(
            folder,
            lambda tensors: {
                key: torch.cat([value, value[: len(names)] * 0.5]) if "embed_tokens" in key else value
                for key, value in tensors.items()
            },
        )
        change_json(folder / "config.json", vocab_size=len(tokenizer))
