"""The families of models that people use, each as a tiny random model of two layers."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 151  # odd, and not a multiple of any block
WINDOW = 6  # tokens that a sliding window holds, fewer than a row has
LENGTH = 64  # positions
START, END = 0, 1  # tokens

PLAIN: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": LENGTH, "tie_word_embeddings": False,
}  # fmt: skip
SAME_HEADS = PLAIN | {"num_key_value_heads": 4}
EXPERTS = PLAIN | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = SAME_HEADS | {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 24,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
ALTERNATING = ["sliding_attention", "full_attention"]
LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0], "original_max_position_embeddings": 32,
}  # fmt: skip


class Family(NamedTuple):
    """One row of the table: a name, transformers' model type, and the settings that make it tiny."""

    name: str
    model_type: str
    settings: Mapping[str, Any]
    dtype: torch.dtype = torch.float64

    def config(self) -> Any:
        """Return the configuration."""
        ids = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": END}
        return AutoConfig.for_model(
            self.model_type, vocab_size=VOCABULARY, **ids, **{"initializer_range": 0.2} | dict(self.settings)
        )

    def model(self, seed: int = 0) -> PreTrainedModel:
        """Return a random model whose distributions are far from uniform, in evaluation mode."""
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(self.config(), dtype=torch.float32).to(self.dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases begin at 1 and 0, and padding's embedding at 0
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=self.dtype)
        plain: PreTrainedModel = model.eval()
        return plain


FAMILIES = (
    Family("Llama", "llama", PLAIN),
    Family("Llama, tied", "llama", PLAIN | {"tie_word_embeddings": True}),
    Family("Llama 4 (text)", "llama4_text", PLAIN | {
        "intermediate_size_mlp": 48, "num_local_experts": 4, "head_dim": 8, "attention_chunk_size": 8,
        "no_rope_layers": [1, 0], "attn_temperature_tuning": True, "floor_scale": 4,
    }),
    Family("Qwen2.5", "qwen2", PLAIN),
    Family("Qwen2 with window", "qwen2", PLAIN | {
        "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1,
    }),
    Family("Qwen3", "qwen3", PLAIN | {"head_dim": 8}),
    Family("Qwen3-MoE", "qwen3_moe", EXPERTS | {"head_dim": 8}, torch.float32),
    Family("Gemma", "gemma", PLAIN | {"head_dim": 8, "tie_word_embeddings": True}),
    Family("Gemma 2", "gemma2", PLAIN | {
        "head_dim": 8, "sliding_window": WINDOW, "layer_types": ALTERNATING, "tie_word_embeddings": True,
        "final_logit_softcapping": 5.0, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 8,
    }),
    Family("Gemma 3 (text)", "gemma3_text", PLAIN | {
        "head_dim": 8, "sliding_window": WINDOW, "layer_types": ALTERNATING, "tie_word_embeddings": True,
        "query_pre_attn_scalar": 8,
    }),
    Family("Gemma 3n (text)", "gemma3n_text", PLAIN | {
        "head_dim": 8, "sliding_window": WINDOW, "layer_types": [*ALTERNATING, *ALTERNATING], "num_hidden_layers": 4,
        "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
        "laurel_rank": 4, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0], "altup_num_inputs": 2,
        "final_logit_softcapping": 5.0, "tie_word_embeddings": True, "intermediate_size": [48] * 4,
    }),
    Family("Phi-1.5, Phi-2", "phi", SAME_HEADS | {"partial_rotary_factor": 0.5}),
    Family("Phi-3", "phi3", PLAIN | {"sliding_window": None}),
    Family("Phi-3 with window", "phi3", PLAIN | {"sliding_window": WINDOW}),
    Family("Phi-3, Phi-4 with long rope", "phi3", PLAIN | {
        "rope_parameters": LONG_ROPE, "original_max_position_embeddings": 32,
    }),
    Family("Phi-4-mini (partial rotary)", "phi3", PLAIN | {"partial_rotary_factor": 0.5, "tie_word_embeddings": True}),
    Family("Llama with dynamic rope", "llama", PLAIN | {
        "max_position_embeddings": 32,
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    }),
    Family("Mistral with window", "mistral", PLAIN | {"sliding_window": WINDOW, "head_dim": 8}),
    Family("Mixtral", "mixtral", PLAIN | {
        "num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True, "sliding_window": None,
    }, torch.float32),
    Family("OLMo", "olmo", SAME_HEADS),
    Family("OLMo 2", "olmo2", SAME_HEADS),
    Family("OLMo 3", "olmo3", SAME_HEADS | {"sliding_window": WINDOW, "layer_types": ALTERNATING}),
    Family("OLMoE", "olmoe", EXPERTS | {"intermediate_size": 24}, torch.float32),
    Family("GPT-2", "gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": LENGTH}),
    Family("GPT-J", "gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": LENGTH, "rotary_dim": 4}),
    Family("GPT-Neo", "gpt_neo", {
        "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": LENGTH, "window_size": WINDOW,
        "attention_types": [[["global", "local"], 1]],
    }),
    Family("GPT-NeoX, Pythia", "gpt_neox", {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": LENGTH,
    }),
    Family("OPT", "opt", {
        "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32,
        "max_position_embeddings": LENGTH,
    }),
    Family("OPT-350m (projected)", "opt", {
        "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 16,
        "max_position_embeddings": LENGTH, "do_layer_norm_before": False,
    }),
    Family("Falcon (rotary)", "falcon", {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": LENGTH,
    }),
    Family("Falcon (alibi)", "falcon", {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True, "multi_query": False,
        "max_position_embeddings": LENGTH,
    }),
    Family("BLOOM", "bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    Family("MPT", "mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": LENGTH, "expansion_ratio": 2}),
    Family("Cohere", "cohere", PLAIN | {"logit_scale": 0.3, "tie_word_embeddings": True}),
    Family("Cohere 2", "cohere2", PLAIN | {
        "logit_scale": 0.3, "tie_word_embeddings": True, "sliding_window": WINDOW, "layer_types": ALTERNATING,
    }),
    Family("Granite", "granite", PLAIN | {
        "logits_scaling": 2.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2,
    }),
    Family("Granite-MoE", "granitemoe", PLAIN | {
        "logits_scaling": 2.0, "embedding_multiplier": 3.0, "num_local_experts": 4, "num_experts_per_tok": 2,
    }, torch.float32),
    Family("SmolLM3", "smollm3", PLAIN | {"no_rope_layers": [1, 0], "use_sliding_window": False}),
    Family("StarCoder2", "starcoder2", PLAIN | {"sliding_window": WINDOW}),
    Family("StableLM", "stablelm", SAME_HEADS),
    Family("GLM-4", "glm4", PLAIN | {"head_dim": 8}),
    Family("GPT-OSS", "gpt_oss", PLAIN | {
        "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW,
        "layer_types": ALTERNATING, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }, torch.float32),
    Family("DeepSeek-V3", "deepseek_v3", LATENT, torch.float32),
    Family("DeepSeek-V3.2", "deepseek_v32", LATENT | {
        "index_topk": 32, "index_n_heads": 2, "index_head_dim": 8,
    }, torch.float32),
    Family("Mamba", "mamba", {
        "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4,
    }, torch.float32),
    Family("Mamba 2", "mamba2", {
        "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 2,
        "chunk_size": 8,
    }, torch.float32),
    Family("Falcon-H1", "falcon_h1", PLAIN | {
        "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8,
        "mamba_chunk_size": 8, "head_dim": 8, "lm_head_multiplier": 0.4, "embedding_multiplier": 2.0,
    }),
    Family("Jamba", "jamba", PLAIN | {
        "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    }, torch.float32),
    Family("Qwen3-Next", "qwen3_next", EXPERTS | {
        "head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "shared_expert_intermediate_size": 24,
    }, torch.float32),
    Family("LFM2", "lfm2", PLAIN | {"layer_types": ["conv", "full_attention"]}),
    Family("RecurrentGemma", "recurrent_gemma", PLAIN | {
        "block_types": ["recurrent", "attention"], "attention_window_size": WINDOW, "lru_width": 32, "head_dim": 8,
    }),
    Family("RWKV", "rwkv", {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2,
                            "context_length": LENGTH}),
)  # fmt: skip
