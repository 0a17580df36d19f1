"""A GGUF file, made for llama.cpp, as a plain folder for transformers."""

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


def write_plain(file: Path, folder: Path) -> None:
    """Write the model in `file` into `folder` as float32 safetensors with its tokenizer.

    transformers refuses to save a model read from GGUF, so its weights move into a fresh plain one.
    """
    place: Any = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    quantised = AutoModelForCausalLM.from_pretrained(**place)
    config: Any = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(quantised.state_dict())
    plain.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**place).save_pretrained(folder)
