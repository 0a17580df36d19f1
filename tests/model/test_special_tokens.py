"""Which token a text starts from and which end it: one order, and whatever is not plain is said."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cfsd.errors import BadInput
from cfsd.model.checkpoint import Checkpoint
from cfsd.model.fetching import examine
from cfsd.model.loading import load_tokenizer, read_eos_ids, read_start_token
from cfsd.model.special_tokens import start_token
from cfsd.store.artifact import Artifact, Store
from tests.conftest import fetched
from tests.model.folders import change_json, give_special_tokens, write_config

BOS, EOS, D, Z = 0, 1, 5, 27  # of the random model's 32 tokens; D is the letter d
TEXT, TURN = 32, 33  # where added: <|endoftext|> and <|im_end|>
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture
def model(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def qwen(folder: Path, config_bos: int | None = TEXT) -> None:
    """Like Qwen 2.5: no BOS, turns end with EOS, documents are separated by another token, the config's BOS."""
    give_special_tokens(folder, "<|endoftext|>", "<|im_end|>", bos_token=None, eos_token="<|im_end|>")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    change_json(folder / "config.json", bos_token_id=config_bos, eos_token_id=TURN)
    change_json(folder / "generation_config.json", eos_token_id=[TURN, TEXT])


def no_bos(folder: Path, **config: Any) -> None:
    give_special_tokens(folder, bos_token=None)
    change_json(folder / "config.json", **({"bos_token_id": ...} | config))


def chat_without_separator(folder: Path) -> None:
    no_bos(folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")


STARTS: dict[str, tuple[Callable[[Path], None], int, str]] = {
    "plain": (lambda folder: None, BOS, ""),
    "plain, config silent": (lambda folder: change_json(folder / "config.json", bos_token_id=None), BOS, ""),
    "Qwen": (qwen, TEXT, "'<|endoftext|>'), config.json's bos_token_id; the tokenizer has no BOS"),
    "Qwen, config silent": (lambda f: qwen(f, None), TEXT, "the document separator; the tokenizer has no BOS"),
    "EOS alone": (no_bos, EOS, "1 ('<eos>'), EOS; the tokenizer has no BOS"),
    "EOS ends turns": (chat_without_separator, EOS, "the chat template ends turns with it, so set base.start_token"),
    "config has another": (
        lambda f: change_json(f / "config.json", bos_token_id=EOS, pad_token_id=None)
        or give_special_tokens(f, pad_token="."),
        EOS, "config.json's bos_token_id; the tokenizer has 0 ('<bos>')"),
    "config has padding": (
        lambda f: change_json(f / "config.json", bos_token_id=EOS), BOS, "1 ('<eos>'), which pads or replaces"),
    "config has a letter": (
        lambda f: change_json(f / "config.json", bos_token_id=D), BOS,
        "config.json has 5 ('d'), which is ordinary text"),
    "config has a letter, no BOS": (lambda f: no_bos(f, bos_token_id=D), EOS, "EOS; config.json has 5 ('d')"),
}  # fmt: skip


@pytest.mark.parametrize("kind", STARTS)
def test_the_start_token_follows_one_order_and_is_said(kind: str, store: Store, model: Path) -> None:
    change, token, said = STARTS[kind]
    change(model)
    made = fetched(store, model)
    notes: Any = made.metadata.get("said", [])
    starts = [note for note in notes if note.startswith("start of a text")]
    assert made.metadata["start_token"] == read_start_token(store.path(made)) == token
    assert len(starts) == bool(said)
    assert said in "".join(starts)


def test_what_the_recipe_wants_or_came_with_the_folder_is_taken_without_a_word(store: Store, model: Path) -> None:
    change_json(model / "config.json", bos_token_id=999)
    wanted = fetched(store, model, start_token="a")
    assert (wanted.metadata["start_token"], "said" in wanted.metadata) == (2, False)
    (model / "start_token.json").write_text('{"start_token": 7}')
    assert fetched(store, model).metadata["start_token"] == 7


@pytest.mark.parametrize("wanted", ["<nonsense>", "ab", ""])
def test_a_wanted_start_token_outside_the_vocabulary_is_refused(model_folder: Path, wanted: str) -> None:
    with pytest.raises(BadInput, match="not a token"):
        start_token(model_folder, load_tokenizer(model_folder), wanted)


ENDS: dict[str, tuple[Callable[[Path], None], tuple[int, ...], str]] = {
    "plain": (lambda f: None, (EOS,), ""),
    "in the config alone": (lambda f: (f / "generation_config.json").unlink(), (EOS,), ""),
    "several, one special": (lambda f: write_config(f, eos_token_id=[EOS, D]), (EOS, D), ""),
    "the config has another": (
        lambda f: change_json(f / "config.json", eos_token_id=BOS), (EOS,),
        "1 ('<eos>'), from generation_config.json; config.json has 0 ('<bos>')"),
    "the tokenizer has another": (
        lambda f: write_config(f, eos_token_id=BOS), (BOS,), "the tokenizer has 1 ('<eos>')"),
    "the tokenizer alone has one": (
        lambda f: write_config(f, eos_token_id=None), (EOS,), "the model's files name none"),
    "an empty list": (lambda f: write_config(f, eos_token_id=[]), (EOS,), "the model's files name none"),
    "none": (
        lambda f: write_config(f, eos_token_id=None) or give_special_tokens(f, eos_token=None), (),
        "texts end by length"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ENDS)
def test_the_end_tokens_that_are_taken_are_said_and_all_readers_have_them(kind: str, store: Store, model: Path) -> None:
    change, ids, said = ENDS[kind]
    change(model)
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    made = fetched(store, model)
    notes: Any = made.metadata.get("said", [])
    ends = [note for note in notes if note.startswith("end of a text")]
    assert read_eos_ids(store.path(made)) == ids == tuple(made.metadata["end_tokens"])  # type: ignore[arg-type]
    assert len(ends) == bool(said)
    assert said in "".join(ends)
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    **{
        f"eos {value!r}": (lambda f, value=value: write_config(f, eos_token_id=value), f"eos_token_id {words}")  # type: ignore[misc]
        for value, words in [
            (50256, "50256 .*outside its vocabulary of 32"), ([1, 32], "32 .*outside"), (-1, "-1 .*outside"),
            ("1", "'1' .*not a token's id"), (1.0, "1.0 .*not a token's id"), (True, "True .*not a token's id"),
            ([1, None], r"\[1, None\] .*not a token's id"), ([[1]], r"\[\[1\]\] .*not"), ({}, "{} .*not a token's id"),
            (D, "of the model .*the ordinary token 5 .'d'"), ([D, Z], "of the model .*ordinary token 5 .'d'., 27"),
        ]
    },
    **{
        f"bos {value!r}": (lambda f, value=value: change_json(f / "config.json", bos_token_id=value), words)  # type: ignore[misc]
        for value, words in [(99, "bos_token_id 99 .*outside .*base.start_token"), (-1, "bos_token_id -1 .*outside"),
                             ("0", "bos_token_id '0' .*not a token's id")]
    },
    **{
        f"start_token.json {text}": (lambda f, text=text: (f / "start_token.json").write_text(text), words)  # type: ignore[misc]
        for text, words in [('{"start_token": 32}', "start token 32 .*outside"),
                            ('{"start_token": "a"}', "'a', which is"),
                            ("{}", "start_token None"), ("[", "not valid JSON")]
    },
    "a tokenizer that is larger": (
        lambda f: give_special_tokens(f, "<|im_start|>", resize=False),
        r"'<\|im_start\|>' with id 32, but the model's embedding has 32 rows"),
    "neither BOS nor EOS": (
        lambda f: write_config(f, bos_token_id=None, eos_token_id=None)
        or give_special_tokens(f, bos_token=None, eos_token=None),
        r"neither BOS nor EOS.*base\.start_token"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_ids_that_cannot_be_are_refused_before_anything_runs(kind: str, model: Path) -> None:
    change, words = REFUSED[kind]
    change(model)
    with pytest.raises(BadInput, match=words) as refused:
        examine(Checkpoint(kind="folder", path=str(model)))
    assert "/tmp/tmp" not in str(refused.value)


def test_a_text_ends_with_the_tokenizers_end_token_where_the_models_files_name_it(base: Artifact, store: Store) -> None:
    assert json.loads((store.path(base) / "generation_config.json").read_text())["eos_token_id"] == EOS


def test_a_tokenizer_that_needs_another_package_names_it(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    (folder / "tokenizer.json").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
    monkeypatch.setattr("cfsd.model.loading.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"tokenizer\.model alone is read with more packages: pip install sentencepiece"):
        load_tokenizer(folder)
