"""How many tokens a text comes to, for estimates: counted where the tokenizer is at hand, else guessed."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer

BYTES_PER_TOKEN = 4  # of English in vocabularies of tens of thousands
Count = Callable[[str], float]


@cache
def token_count(kind: str, folder: Path | None) -> Count:
    """Return a function from a text to its tokens, for a checkpoint of this `kind`; `folder` is None before a fetch.

    Of what is neither fetched nor a folder, and of tokenizers without a `tokenizer.json`, bytes are counted.
    """
    if kind == "tiny":
        return lambda text: float(len(text))  # a token is a character
    file = folder / "tokenizer.json" if folder else None
    if not file or not file.is_file():
        return lambda text: len(text.encode(errors="replace")) / BYTES_PER_TOKEN
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()  # which some were saved with, and which would give every text one length
    tokenizer.no_truncation()
    return lambda text: float(len(tokenizer.encode(text, add_special_tokens=False)))
