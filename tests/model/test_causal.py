"""Causality is proved by forward passes, not believed: a later token changes no earlier prediction."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cfsd.errors import BadInput
from cfsd.model.causal import check_architecture, check_predictions

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CAUSAL: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}), ("gpt2", {}), ("qwen2", {}), ("gemma2", {"sliding_window": 4}), ("gemma3_text", {}),
    ("mistral", {"sliding_window": 3}), ("mixtral", EXPERTS), ("qwen3_moe", EXPERTS), ("gpt_oss", EXPERTS),
    ("bert", {"is_decoder": True}), ("roberta", {"is_decoder": True}), ("mamba", {}), ("phi3", {}), ("olmo2", {}),
]  # fmt: skip
SEEING: list[tuple[str, dict[str, Any]]] = [
    ("bert", {}), ("roberta", {}), ("electra", {}), ("xlm-roberta", {}),
    ("gemma3_text", {"use_bidirectional_attention": True}),
    ("gemma3_text", {"use_bidirectional_attention": True, "sliding_window": 4, "num_hidden_layers": 7}),
]  # fmt: skip


def config_of(kind: str, **fields: Any) -> Any:
    return AutoConfig.for_model(kind, **SIZES | fields)


@pytest.mark.parametrize(("kind", "fields"), CAUSAL)
def test_decoders_pass_small_and_real(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(kind, **fields)
    assert check_architecture(config, "mine") == []
    torch.manual_seed(0)
    for precision in (torch.float32, torch.bfloat16):  # rounding is not taken for a change
        check_predictions(AutoModelForCausalLM.from_config(config, dtype=precision).eval(), tmp_path)


@pytest.mark.parametrize(("kind", "fields"), SEEING)
def test_models_that_read_the_whole_text_are_refused_before_their_weights_are_read(
    kind: str, fields: dict[str, Any]
) -> None:
    with pytest.raises(BadInput, match="'mine' is not causal"):
        check_architecture(config_of(kind, **fields), "mine")


@pytest.mark.parametrize("kind", ["gemma3n_text", "jamba", "mamba2", "phi", "deepseek_v3"])
def test_the_published_sizes_of_other_families_have_a_small_copy(kind: str) -> None:
    assert check_architecture(AutoConfig.for_model(kind), "mine") == []


def test_the_size_of_a_model_does_not_matter() -> None:
    """A model of 70 billion weights is tried in seconds: few layers, heads, and tokens, of the same kinds."""
    wide = {"hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128}
    large = config_of("llama", **wide, num_hidden_layers=80, intermediate_size=28672, vocab_size=128_256)
    assert check_architecture(large, "mine") == []
    assert (large.num_hidden_layers, large.hidden_size, large.vocab_size) == (80, 8192, 128_256)


class Seeing(torch.nn.Module):
    """A model whose last layer adds what stands `back` places after a token to its logits."""

    def __init__(self, model: Any, back: int, only_from: int, size: float) -> None:
        super().__init__()
        self.model, self.back, self.only_from, self.size = model, back, only_from, size
        self.config, self.device = model.config, model.device

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        out = self.model(input_ids=input_ids, **kwargs)
        later = self.model.get_input_embeddings()(input_ids).sum(-1, keepdim=True).roll(-self.back, 1)
        later[:, : self.only_from] = 0
        later[:, -self.back :] = 0
        out.logits = out.logits + self.size * later
        return out


@pytest.mark.parametrize(("back", "only_from"), [(1, 0), (1, 10), (9, 0)])
def test_a_look_ahead_at_a_few_places_is_seen_in_the_real_model(back: int, only_from: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of("llama", initializer_range=0.3)).eval()
    check_predictions(model, tmp_path)
    with pytest.raises(BadInput, match="is not causal"):
        check_predictions(Seeing(model, back, only_from, 3.0), tmp_path)  # type: ignore[arg-type]


def test_weights_that_predict_no_numbers_are_refused_by_name(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(config_of("llama")).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(3e38)
    with pytest.raises(BadInput, match="predicts NaN or infinite logits"):
        check_predictions(model, tmp_path)
