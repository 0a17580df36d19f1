"""The `tiny` base model: five string skills, with the weights that `benchmarks/tiny_pretraining.py` made.

Pretrained elsewhere they would differ in the last bits, after 1,200 steps in the first too, and a baseline made on one
machine would not be of the base of another.
"""

from pathlib import Path

from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WEIGHTS = Path(__file__).parents[1] / "tiny.safetensors"
BOS, EOS, UNKNOWN = "<bos>", "<eos>", "<unk>"
CONTEXT = 256


def shipped(folder: Path) -> None:
    """Write a whole `transformers` folder of the model with the committed weights into `folder`."""
    tokenizer = new_tokenizer()
    model = new_model(tokenizer)
    model.load_state_dict(load_file(WEIGHTS))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Return one token per printable ASCII character or line break; nothing is added when encoding."""
    tokens = [BOS, EOS, UNKNOWN, "\n", *(chr(code) for code in range(32, 127))]
    characters = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNKNOWN))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the model with random weights."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.1,  # with the usual 0.02 a width of 64 takes half as many steps again
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # documents have under 20 tokens
        pad_token_id=tokenizer.pad_token_id,
        **ids,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id, **ids)
    return model
