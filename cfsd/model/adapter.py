"""Adapter: what PEFT training left of a model, to be merged into its base before it is measured."""

import json
from pathlib import Path
from typing import Any

from pydantic import Field
from safetensors import SafetensorError, safe_open

from cfsd.errors import BadInput
from cfsd.machine import home
from cfsd.spec import Spec
from cfsd.store.digests import DigestMemory, digest_of_files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LANGUAGE = ("CAUSAL_LM", None)  # the tasks whose adapters change a language model and nothing else
UNMERGEABLE = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT")


class Adapter(Spec):
    """A folder that PEFT wrote: adapter_config.json and adapter_model.safetensors."""

    path: str = Field(description="The folder; its content is its identity")

    def label(self) -> str:
        """Return a short name for people."""
        return Path(self.path).name

    def config(self) -> dict[str, Any]:
        """Return what adapter_config.json holds. Raises BadInput when it is no JSON object."""
        try:
            config = json.loads((Path(self.path) / CONFIG).read_text())
            if not isinstance(config, dict):
                raise ValueError("it is not an object")
        except (ValueError, OSError) as error:
            raise BadInput(f"{CONFIG} of adapter {self.path!r} cannot be read: {error}; copy it again") from error
        return config

    def check(self) -> None:
        """Check what the files show, without reading weights.

        Raises:
            BadInput: for weights that are absent, pickled or cut short, and for an adapter that cannot be merged.
        """
        config, weights = self.config(), Path(self.path) / WEIGHTS
        if config.get("peft_type") in UNMERGEABLE:
            raise BadInput(
                f"adapter {self.path!r} is of type {config['peft_type']}, which adds to the prompt and cannot be "
                "merged into weights; allowed are LoRA and its kin (DoRA, LoHa, LoKr, OFT, IA3)"
            )
        if config.get("task_type") not in LANGUAGE:
            raise BadInput(
                f"adapter {self.path!r} was trained for the task {config['task_type']}; allowed is CAUSAL_LM"
            )
        if not weights.is_file():
            raise BadInput(
                f"adapter {self.path!r} has no {WEIGHTS}; weights in pickle files (.bin) are never read: load it with "
                "PEFT and save it with save_pretrained"
            )
        try:
            with safe_open(weights, framework="numpy") as tensors:
                if not tensors.keys():
                    raise BadInput(f"{weights} holds no tensor: the training saved nothing; save the adapter again")
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{weights} is damaged or was cut short ({error}); copy it again") from error

    def _identity(self) -> dict[str, Any]:
        memory = DigestMemory(home())
        return {"content": digest_of_files({n: memory.sha256(Path(self.path) / n) for n in (CONFIG, WEIGHTS)})}


def is_adapter(path: str | None) -> bool:
    """Say whether `path` is the folder of an adapter."""
    return bool(path) and (Path(path or "") / CONFIG).is_file()
