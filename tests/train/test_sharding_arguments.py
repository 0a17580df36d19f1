"""What accelerate is told where weights are sharded."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cfsd.errors import BadInput
from cfsd.machine import Machine
from cfsd.train.arguments import settle_sharding
from cfsd.train.spec import TrainSpec, check_sharding


def model_of(family: str) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(family))
    return model


def arguments() -> Any:
    given = {"fsdp_version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    return SimpleNamespace(fsdp_plugin_args=given, bf16=True)


@pytest.mark.parametrize(("family", "layer"), [("llama", "LlamaDecoderLayer"), ("qwen3_5_text", "Qwen3_5DecoderLayer")])
def test_the_layers_that_a_model_has_are_sharded_and_gradients_summed_in_float32(family: str, layer: str) -> None:
    """A text model of a family that also sees names layers that it lacks: accelerate refused it while it trained."""
    model, args = model_of(family), arguments()
    settle_sharding(args, model)
    plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
    plugin.set_mixed_precision("bf16")  # as Accelerator does, which keeps a policy that is given
    plugin.set_auto_wrap_policy(model)
    assert args.fsdp_plugin_args["transformer_cls_names_to_wrap"] == layer
    policy: Any = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (torch.bfloat16, torch.float32, None)


def test_an_optimizer_that_cannot_update_shards_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """adafactor failed at its first step, after the corpus was sampled."""
    monkeypatch.setattr(Machine, "resolved_sharding", lambda _: "shard")
    check_sharding(TrainSpec(seed=0), Machine())
    with pytest.raises(BadInput, match=r"but train.optimizer adafactor does not update shards \(adamw and sgd do\)"):
        check_sharding(TrainSpec(seed=0, optimizer="adafactor"), Machine())


def test_a_model_without_named_layers_is_refused_and_whole_ones_need_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model, args = model_of("llama"), arguments()
    monkeypatch.setattr(model, "_no_split_modules", None)
    with pytest.raises(BadInput, match="LlamaForCausalLM names no layers by which it could be sharded"):
        settle_sharding(args, model)
    settle_sharding(SimpleNamespace(fsdp_plugin_args=None, bf16=True), model)  # type: ignore[arg-type]
