"""Settings of written answers, tried on a model of a few numbers: what fails there fails with every model."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cfsd.evaluate.benchmark import WRITTEN
from cfsd.evaluate.benchmark_settings import LIMITS

VOCABULARY = 1 << 18  # more than most models have: settings may name any token
CONTEXT = 8


def try_generation(settings: Mapping[str, Any]) -> None:
    """Write one token with these generation settings; raises whatever lm-eval and transformers raise."""
    own = {name: value for name, value in settings.items() if name not in LIMITS}
    arguments = ("a", {**own, "max_gen_toks": 1})
    request = Instance(request_type=WRITTEN, doc={}, arguments=arguments, idx=0)
    _model().generate_until([request], disable_tqdm=True)


@cache
def _model() -> Any:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"?": 0, "</s>": 1}, unk_token="?")),
        unk_token="?", eos_token="</s>", pad_token="</s>",
    )  # fmt: skip
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=2, intermediate_size=2, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=CONTEXT, bos_token_id=1, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return HFLM(pretrained=LlamaForCausalLM(config), tokenizer=tokenizer, batch_size=1)
