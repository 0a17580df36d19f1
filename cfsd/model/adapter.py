"""Adapter: what PEFT training left of a model, to be merged into its base before it is measured."""

from pathlib import Path
from typing import Any, Self

from pydantic import Field
from safetensors import SafetensorError, safe_open

from cfsd.errors import BadInput
from cfsd.machine import home
from cfsd.model.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from cfsd.model.folder import INDEX, WEIGHTS, listed, read_object
from cfsd.spec import Spec
from cfsd.store.digests import DigestMemory, digest_of_files

LANGUAGE = ("CAUSAL_LM", None)  # the tasks whose adapters change a language model and nothing else
UNMERGEABLE = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT",
               "CARTRIDGE", "XLORA", "POLY")  # fmt: skip
# initial values: quantised, random, or from data; the base is less these, and a saved adapter does not say by what
LOST = ("loftq", "pissa_niter", "corda", "lora_ga")
TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
             "spiece.model")  # fmt: skip


class Adapter(Spec):
    """A folder that PEFT wrote: adapter_config.json and adapter_model.safetensors, perhaps with a tokenizer."""

    path: str = Field(description="The folder; its content is its identity")

    @classmethod
    def at(cls, path: str | None) -> Self | None:
        """Return the adapter in the folder `path`; None where a model may be.

        Raises:
            BadInput: for a folder that holds neither, but folders with adapters, as a trainer leaves them.
        """
        folder = Path(path or "")
        if not path or not folder.is_dir():
            return None
        if any((folder / name).is_file() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)):
            return cls(path=path)
        below = sorted(str(file.parent) for file in folder.glob(f"*/{ADAPTER_CONFIG}"))
        if below and not (folder / "config.json").is_file():
            raise BadInput(f"{path!r} holds no model and no adapter itself, but adapters in {listed(below)}: give one")
        return None

    def label(self) -> str:
        """Return a short name for people; a trainer's checkpoint is named with its run."""
        folder = Path(self.path).resolve()
        return f"{folder.parent.name}/{folder.name}" if folder.name.startswith("checkpoint-") else folder.name

    def config(self) -> dict[str, Any]:
        """Return what adapter_config.json holds. Raises BadInput."""
        return read_object(Path(self.path) / ADAPTER_CONFIG)

    def named_base(self) -> str:
        """Return the model that the adapter says it was trained on; empty if it does not say. Raises BadInput."""
        return str(self.config().get("base_model_name_or_path") or "")

    def check(self) -> None:
        """Check what the files show, without reading weights.

        Raises:
            BadInput: for weights that are absent, pickled or cut short, and for an adapter that cannot be merged.
        """
        config = self.config()
        self._check_kind(config)
        self._check_weights(Path(self.path) / ADAPTER_WEIGHTS)
        if any((Path(self.path) / name).exists() for name in (WEIGHTS, INDEX)):
            raise BadInput(
                f"{self.path!r} holds a whole model and an adapter ({ADAPTER_WEIGHTS}), so it is unknown which is "
                "meant; give a folder with one of them"
            )

    def _check_kind(self, config: dict[str, Any]) -> None:
        kind, task = config.get("peft_type"), config.get("task_type")
        if not isinstance(kind, str):
            raise BadInput(f"{Path(self.path) / ADAPTER_CONFIG} has peft_type {kind!r}; copy the adapter's own file")
        if kind in UNMERGEABLE:
            raise BadInput(
                f"adapter {self.path!r} is of type {kind}, which is no change of weights and cannot be "
                "merged into them; allowed are LoRA and its kin (DoRA, LoHa, LoKr, OFT, IA3)"
            )
        if task not in LANGUAGE:
            raise BadInput(f"adapter {self.path!r} was trained for the task {task}; allowed is CAUSAL_LM")
        if str(init := config.get("init_lora_weights")).startswith(LOST):
            raise BadInput(
                f"adapter {self.path!r} began with {init}, which changed the base's weights in a way that is not kept "
                "beside it; give as TUNED the whole model, merged where it was trained, or save the adapter with "
                "path_initial_model_for_weight_conversion"
            )

    def _check_weights(self, file: Path) -> None:
        if not file.is_file():
            raise BadInput(
                f"adapter {self.path!r} has no {ADAPTER_WEIGHTS}; weights in pickle files (.bin) are never read: load "
                "it with PEFT and save it with save_pretrained"
            )
        try:
            with safe_open(file, framework="numpy") as tensors:
                if not tensors.keys():
                    raise BadInput(f"{file} holds no tensor: the training saved nothing; save the adapter again")
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{file} is damaged or was cut short ({error}); copy it again") from error

    def _identity(self) -> dict[str, Any]:
        """Return the content: the adapter's own files, and those of a tokenizer, which is compared with the base's."""
        memory, folder = DigestMemory(home()), Path(self.path)
        own = [folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS]
        files = own + [file for pattern in TOKENIZER for file in folder.glob(pattern) if file.is_file()]
        return {"content": digest_of_files({file.name: memory.sha256(file) for file in files})}
