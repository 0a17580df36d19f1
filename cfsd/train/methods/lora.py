"""Train two small matrices beside each large one."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, NonNegativeInt, PositiveInt

from cfsd.errors import BadInput
from cfsd.train.methods.method import Method

if TYPE_CHECKING:
    from torch import nn

ADAPTER = "adapter"


class Lora(Method):
    """W = W* + (alpha / rank) B A, only A and B trained, B = 0 at the start; with PEFT.

    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.
    Differs: all linear layers but the head, where the paper takes the attention's query and value.
    """

    trains_other_weights: ClassVar[bool] = True

    rank: NonNegativeInt = Field(
        0, description="Width of the added matrices; 0: off. Wants about ten times the learning rate of full training"
    )
    alpha: PositiveInt | None = Field(None, description="The added product is multiplied by alpha / rank; empty: rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="Of the added path's input, in training")
    targets: tuple[str, ...] = Field(
        (),
        description="Names of the layers that get one, such as [q_proj, v_proj]; empty: all linear ones but the head",
    )

    def is_on(self) -> bool:
        """Say whether there is a rank."""
        return self.rank > 0

    def adapt(self, model: "nn.Module") -> "nn.Module":
        """Return a PeftModel over `model`, whose weights are frozen. Draws A from torch's global generator.

        Raises BadInput for a target that the model does not have.
        """
        from peft import LoraConfig, get_peft_model
        from transformers.pytorch_utils import Conv1D

        layers = _linear_layers(model)
        targets = self._targets(layers)
        plain: Any = model
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha or self.rank,
            lora_dropout=self.dropout,
            target_modules=targets,
            fan_in_fan_out=any(isinstance(layers[name], Conv1D) for name in layers),
        )  # no task type: PEFT then passes all arguments of a call on as they are
        adapted: nn.Module = get_peft_model(plain, config)
        return adapted

    def merge_adapter(self, model: "nn.Module", folder: Path) -> "nn.Module":
        """Return the plain model with the added products in its weights; write the adapter to `folder`/adapter."""
        adapted: Any = model
        _write(adapted, folder / ADAPTER)
        plain: nn.Module = adapted.merge_and_unload()
        return plain

    def _targets(self, layers: "dict[str, nn.Module]") -> list[str]:
        known = {name.rpartition(".")[2] for name in layers}
        wanted = self.targets or tuple(known)
        strange = [name for name in wanted if not any(f".{layer}".endswith(f".{name}") for layer in layers)]
        if strange:
            raise BadInput(
                f"lora.targets {', '.join(strange)}: this model has no such linear layer; "
                f"allowed: {', '.join(sorted(known))}; leave it empty for all of them"
            )
        return sorted(wanted)


def _linear_layers(model: Any) -> "dict[str, nn.Module]":
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head}


def _write(adapted: Any, folder: Path) -> None:
    """Write the adapter as PEFT reads it, the same bytes wherever it was trained.

    PEFT's own save adds the base's path on this machine, its version and a model card, and lists targets in
    the order of a set.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    from cfsd.store.digests import write_json

    folder.mkdir(exist_ok=True)
    tensors = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"})
    config = adapted.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": None, "inference_mode": True, "task_type": "CAUSAL_LM"}
    config["target_modules"] = sorted(config["target_modules"])
    del config["peft_version"]
    write_json(folder / "adapter_config.json", config)
