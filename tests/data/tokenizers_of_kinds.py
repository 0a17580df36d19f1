"""Small tokenizers of the kinds that people's models have, trained on a few sentences."""

from collections.abc import Callable
from functools import cache
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "the cat sat on the mat", "Question: what is two plus two? Answer: four", "unhappy people are not happy",
    "a naïve café — déjà vu", "say 😀 and 👩‍🚀 twice", "line one\nline two\n\nline three", "  spaced  out  ", "x=y+z;",
    "answer the question", "happy", "ﬁne ﬁles", "e\u0301te\u0301",
] * 3  # fmt: skip
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_end|>"]
SPLIT = Regex(r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def _trained(model: Any, trainer: Any, **parts: Any) -> Tokenizer:
    raw = Tokenizer(model)
    for name, part in parts.items():
        setattr(raw, name, part)
    raw.train_from_iterator(SENTENCES, trainer)
    return raw


def _bpe(**settings: Any) -> Any:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False, **settings
    )


def gpt2(*, trim: bool = False) -> Tokenizer:
    return _trained(
        models.BPE(), _bpe(), pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoder=decoders.ByteLevel(), post_processor=processors.ByteLevel(trim_offsets=trim),
    )  # fmt: skip


def qwen(*, ignore_merges: bool = False) -> Tokenizer:
    split = [pre_tokenizers.Split(SPLIT, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    return _trained(
        models.BPE(ignore_merges=ignore_merges), _bpe(), normalizer=normalizers.NFC(),
        pre_tokenizer=pre_tokenizers.Sequence(split), decoder=decoders.ByteLevel(),
    )  # fmt: skip


def prepending() -> Tokenizer:
    """A space before every text, and no words: merges go across spaces (Llama 2, Mistral 0.1, Phi-3)."""
    marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    raw = _trained(
        models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True),
        trainers.BpeTrainer(
            vocab_size=640, show_progress=False, special_tokens=[*SPECIAL, *(f"<0x{i:02X}>" for i in range(256))],
        ),
        normalizer=normalizers.Sequence(marks),
    )  # fmt: skip
    strip = decoders.Strip(" ", 1, 0)
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )  # fmt: skip
    return raw


def metaspace(scheme: str) -> Tokenizer:
    return _trained(
        models.BPE(unk_token="<unk>"), _bpe(), pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme=scheme),
        decoder=decoders.Metaspace(prepend_scheme=scheme),
    )  # fmt: skip


def unigram() -> Tokenizer:
    trainer = trainers.UnigramTrainer(vocab_size=160, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    return _trained(
        models.Unigram(), trainer, normalizer=normalizers.NFKC(), pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
    )  # fmt: skip


def wordpiece() -> Tokenizer:
    trainer = trainers.WordPieceTrainer(vocab_size=160, special_tokens=SPECIAL, show_progress=False)
    return _trained(
        models.WordPiece(unk_token="<unk>"), trainer, normalizer=normalizers.BertNormalizer(lowercase=True),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(), decoder=decoders.WordPiece(),
    )  # fmt: skip


def characters() -> Tokenizer:
    found = sorted({character for sentence in SENTENCES for character in sentence})
    raw = Tokenizer(models.WordLevel({token: i for i, token in enumerate([*SPECIAL, *found])}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    return raw


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": gpt2,
    "byte-level, offsets without spaces": lambda: gpt2(trim=True),
    "byte-level, NFC": qwen,
    "byte-level, whole words first": lambda: qwen(ignore_merges=True),
    "a space before every text": prepending,
    "metaspace at the beginning": lambda: metaspace("first"),
    "metaspace never": lambda: metaspace("never"),
    "unigram, NFKC": unigram,
    "wordpiece, lower case": wordpiece,
    "characters": characters,
}


def dropping() -> Tokenizer:
    made = _trained(
        models.BPE(), trainers.BpeTrainer(vocab_size=120, special_tokens=SPECIAL, show_progress=False),
        pre_tokenizer=pre_tokenizers.Metaspace(), decoder=decoders.Metaspace(),
    )  # fmt: skip
    return made


def refusing() -> Tokenizer:
    known = {token: i for i, token in enumerate([*SPECIAL, "the", "cat"])}
    raw = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return raw


REFUSING: dict[str, Callable[[], Tokenizer]] = {  # without a token for what they do not know
    "no unknown token": dropping,
    "words that must be known": refusing,
}


@cache
def raw(kind: str) -> str:
    return str((KINDS | REFUSING)[kind]().to_str())


def tokenizer(kind: str, *, adds: str = "") -> PreTrainedTokenizerFast:
    """Return a tokenizer of `kind`; `adds` is what it puts around every text, such as `<s> $A </s>`."""
    made = Tokenizer.from_str(raw(kind))
    if adds:
        ids = [(token, made.token_to_id(token)) for token in SPECIAL]
        made.post_processor = processors.TemplateProcessing(single=adds, special_tokens=ids)
    unknown = {} if kind in REFUSING else {"unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", **unknown)
