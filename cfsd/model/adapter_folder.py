"""The folder of an adapter where a whole model is needed: refused with the command that merges it."""

import json
import shlex
from pathlib import Path

from cfsd.errors import BadInput

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def check_whole(folder: Path) -> None:
    """Raise BadInput if `folder` holds an adapter in place of a whole model, or beside one."""
    if (folder / ADAPTER_CONFIG).exists():
        if (folder / "config.json").exists() and any(folder.glob("model*.safetensors")):
            raise BadInput(
                f"{str(folder)!r} holds a whole model and {ADAPTER_CONFIG} beside it, at which transformers would load "
                f"the adapter's base; move {ADAPTER_CONFIG} out of the folder"
            )
        raise BadInput(
            f"{str(folder)!r} holds an adapter, not a whole model; merge it into its base first, and give the folder "
            f"MERGED: {merge_command(folder)}"
        )


def merge_command(folder: Path) -> str:
    """Return the shell command that writes the adapter in `folder`, merged into its base, as the model MERGED."""
    try:
        named = json.loads((folder / ADAPTER_CONFIG).read_text()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        named = None
    base, adapter = json.dumps(str(named or "BASE")), json.dumps(str(folder))
    return "python -c " + shlex.quote(
        "from peft import PeftModel as P; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        f'P.from_pretrained(M.from_pretrained({base}, dtype="float32"), {adapter}).merge_and_unload()'
        f'.save_pretrained("MERGED"); T.from_pretrained({base}).save_pretrained("MERGED")'
    )
