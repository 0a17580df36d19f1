"""What tokenizers of one vocabulary do otherwise: a benchmark would count it as a loss of the weights."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from cfsd.model.loading import load_tokenizer
from cfsd.store.artifact import Artifact, Store

TURNS = [{"role": "user", "content": "a b"}]


def differences(own: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> list[str]:
    """Return in what two tokenizers differ: a chat template that writes another text, the end, how a text begins."""
    parts = {
        "chat template": _chat(own) != _chat(theirs),
        "end token": own.eos_token_id != theirs.eos_token_id,
        "start of a text": own("a b").input_ids != theirs("a b").input_ids,
    }
    return [name for name, differs in parts.items() if differs]


def _chat(tokenizer: Any) -> str | None:
    """Return how a chat begins, or the template where it writes none of such; None without a template."""
    if not tokenizer.chat_template:
        return None
    try:
        return str(tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True))
    except Exception:  # of any kind, from the template's own code
        return str(tokenizer.chat_template)


def read_otherwise(store: Store, base: Artifact, tuned: Artifact) -> list[str]:
    """Return what a reader must know where the two are put other prompts, or end their answers elsewhere."""
    tokenizers = [load_tokenizer(store.path(model, weights=False)) for model in (tuned, base)]
    found = differences(*tokenizers)
    if not all(tokenizer.chat_template for tokenizer in tokenizers):  # no benchmark puts chats to both
        found = [name for name in found if name != "chat template"]
    if base.metadata.get("end_tokens") != tuned.metadata.get("end_tokens"):
        found = [*(name for name in found if name != "end token"), "list of end tokens (generation_config.json)"]
    return [
        f"the tuned model's files have another {part} than the base's; each is scored by its own, which alone may "
        "change scores: to compare the weights, put the same tokenizer and generation_config files into both folders"
        for part in found
    ]
