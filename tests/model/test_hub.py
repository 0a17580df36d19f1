"""Hub models against a server of our own: a branch becomes a commit, and every failure one message in time."""

import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from cfsd.data.replay import Replay
from cfsd.data.target import Target
from cfsd.errors import BadInput
from cfsd.model import hub
from cfsd.model.checkpoint import Checkpoint
from cfsd.model.fetching import examine, fetch
from cfsd.store.artifact import Store, key_of
from tasks.fetch import check_model
from tests.model.folders import change_json

COMMIT, OTHER = "a" * 40, "b" * 40
HINDRANCES = {  # the name of a repository -> status and code of what the hub answers
    "org/gated": (403, "GatedRepo"),
    "org/private": (401, "RepoNotFound"),
    "org/nobody": (404, "RepoNotFound"),
    "org/limited": (429, ""),
}


class Hub(ThreadingHTTPServer):
    """The few addresses that a download asks; `org/good` has the branches main and dev."""

    daemon_threads = True
    folder: Path
    asked: list[str]
    tokens: list[str | None]
    silent = False


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.server.tokens.append(self.headers.get("Authorization"))
        if self.server.silent:
            time.sleep(2)
        parts = re.sub("^/api/(models|datasets)", "", self.path).strip("/").split("?")[0].split("/")
        name, (what, revision), rest = "/".join(parts[:2]), parts[2:4], "/".join(parts[4:])
        if name in HINDRANCES:
            return self._send(b"", *HINDRANCES[name])
        if name not in ("org/good", "org/gguf", "org/adapter"):
            return self._send(b"", 404, "RepoNotFound")
        commit = {"main": COMMIT, "dev": OTHER, COMMIT: COMMIT, OTHER: OTHER}.get(revision)
        if commit is None:
            return self._send(b"", 404, "RevisionNotFound")
        if what == "revision":
            listed = [{"rfilename": path.name} for path in self.server.folder.iterdir()]
            return self._send(json.dumps({"id": name, "sha": commit, "siblings": listed}).encode())
        if what == "tree":
            return self._send(json.dumps([self._entry(path) for path in self.server.folder.iterdir()]).encode())
        file = self.server.folder / rest
        if (name, rest) == ("org/adapter", "adapter_config.json"):
            return self._send(b"{}", commit=commit)
        if name != "org/good" or not file.exists():
            return self._send(b"", 404, "EntryNotFound", commit)
        return self._send(file.read_bytes(), commit=commit)

    def _entry(self, path: Path) -> dict[str, Any]:
        return {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": f"{hash(path.name):x}"}

    def _send(self, body: bytes, status: int = 200, code: str = "", commit: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hash(body):x}"')
        for name, value in (("X-Error-Code", code), ("X-Repo-Commit", commit)):
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def served(home: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub(("127.0.0.1", 0), Handler)
    server.folder, server.asked, server.tokens = model_folder, [], []
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "_commits", {})
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.shutdown()
    server.server_close()


def fetched_from_hub(store: Store, text: str) -> Any:
    checkpoint = Checkpoint.model_validate(text)
    return store.make("model", key_of("fetch", checkpoint), lambda draft: fetch(checkpoint, draft))[0]


def test_a_branch_is_resolved_once_printed_and_kept(served: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    branch, pinned = (Checkpoint.model_validate(f"org/good@{revision}") for revision in ("dev", OTHER))
    assert branch.model_dump()["revision"] == "dev"  # nobody was asked yet
    assert branch.digest() == pinned.digest()
    branch.check()
    assert branch.model_dump()["revision"] == OTHER
    assert Checkpoint.model_validate("org/good").digest() != branch.digest()
    said = capsys.readouterr().out
    assert said.count(f"org/good@dev is commit {OTHER}") == said.count(f"org/good@main is commit {COMMIT}") == 1
    assert len([path for path in served.asked if "/dev/" in path]) == 1


def test_a_model_is_downloaded_and_then_needs_no_hub(
    served: Hub, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fetched_from_hub(store, "org/good")
    assert (store.path(model) / "model.safetensors").exists()
    asked = len(served.asked)
    pinned = Checkpoint.model_validate(f"org/good@{COMMIT}")
    pinned.check()
    check_model(pinned)
    assert len(served.asked) == asked
    hub._commits.clear()  # another process
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.commit_of("org/good", "main") == COMMIT
    examine(pinned)  # from the cache, as in a new data folder


REFUSED = {
    "org/gated": "org/gated@main is gated: accept its terms .*no token was given: set HF_TOKEN",
    "org/private": "org/private@main does not exist, or is private .* check the id",
    "org/nobody": "org/nobody@main does not exist, or is private",
    "org/good@nowhere": "org/good@nowhere has no revision 'nowhere'",
    f"org/good@{'c' * 40}": "has no revision 'c+'",
    f"org/good@{COMMIT[:7]}": "has no revision 'aaaaaaa'.* 40 hex digits",
    "org/gguf": "org/gguf@main has no config.json, so it is not a transformers model",
    "org/adapter": "org/adapter@main is an adapter.*TUNED to flows.measure.*hf download org/adapter --revision main",
    "org/limited": "org/limited@main could not be had .*429",
    "a b/c@main": "is no name of a hub model",
    "a/b/c@main": "is no name of a hub model",
}


@pytest.mark.parametrize("kind", [Target, Replay])
def test_a_branch_of_a_data_set_is_resolved_once_printed_and_kept(
    kind: Any, served: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = kind(kind="hub", name="org/good")
    rows.check()
    assert capsys.readouterr().out == f"datasets/org/good@main is commit {COMMIT}\n"
    asked = len(served.asked)
    assert rows.model_dump()["revision"] == COMMIT
    assert (
        rows.digest()
        == kind(kind="hub", name="org/good", revision=COMMIT).digest()
        != kind(kind="hub", name="org/good", revision=OTHER).digest()
    )
    assert len(served.asked) == asked
    with pytest.raises(BadInput, match="data set org/good@nowhere has no revision 'nowhere'"):
        kind(kind="hub", name="org/good", revision="nowhere").check()
    with pytest.raises(BadInput, match=r"data set org/nobody@main does not exist, or is private .* check the id$"):
        kind(kind="hub", name="org/nobody").check()


@pytest.mark.parametrize("text", REFUSED)
def test_what_the_hub_refuses_is_one_message(text: str, served: Hub) -> None:
    with pytest.raises(BadInput, match=REFUSED[text]):
        Checkpoint.model_validate(text).check()


def test_a_token_is_sent_and_named(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(BadInput, match="the token that you gave") as refused:
        Checkpoint.model_validate("org/private@main").check()
    assert "hf_secret" not in str(refused.value)
    assert served.tokens[-1] == "Bearer hf_secret"


def away(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:1/{repo_id}/{revision}/{filename}")


def silent(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    served.silent = True
    monkeypatch.setattr(hub, "SECONDS", 0.2)


def offline(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    ("hinder", "words"),
    [
        (away, "could not be had .*check the network"),
        (silent, "could not be had .*Timeout.*check the network"),
        (offline, r"not in the cache .*HF_HUB_OFFLINE.*hf download org/good"),
    ],
)
def test_a_hub_that_does_not_answer_ends_in_one_message_in_time(
    served: Hub, monkeypatch: pytest.MonkeyPatch, hinder: Callable[..., None], words: str
) -> None:
    hinder(served, monkeypatch)
    started = time.monotonic()
    for text in ("org/good@main", f"org/good@{COMMIT}"):
        with pytest.raises(BadInput, match=words):
            Checkpoint.model_validate(text).check()
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("hinder", [away, offline])
def test_without_the_hub_a_branch_is_what_was_downloaded_last(
    served: Hub, store: Store, monkeypatch: pytest.MonkeyPatch, hinder: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    fetched_from_hub(store, "org/good@main")
    hub._commits.clear()
    hinder(served, monkeypatch)
    assert hub.commit_of("org/good", "main") == COMMIT
    assert "what was downloaded last" in capsys.readouterr().out


def test_weights_in_forms_that_are_not_read_are_not_downloaded_and_not_missed(
    served: Hub, model_folder: Path, tmp_path: Path
) -> None:
    served.folder = Path(shutil.copytree(model_folder, tmp_path / "served"))
    shutil.copyfile(served.folder / "model.safetensors", served.folder / "consolidated.safetensors")
    folder = hub.download("org/good", COMMIT)
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert hub.cached_folder("org/good", COMMIT) == folder


def test_a_broken_download_is_found_in_the_plan_of_what_is_cached(served: Hub, tmp_path: Path) -> None:
    hub.download("org/good", COMMIT)
    weights = next((tmp_path / "cache").rglob("model.safetensors")).resolve()
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(BadInput, match=r"model\.safetensors is damaged"):
        examine(Checkpoint.model_validate(f"org/good@{COMMIT}"))


def test_a_plan_downloads_small_files_alone_and_refuses_by_them(
    served: Hub, model_folder: Path, tmp_path: Path
) -> None:
    served.folder = Path(shutil.copytree(model_folder, tmp_path / "served"))
    checkpoint = Checkpoint.model_validate("org/good")
    examine(checkpoint)
    examine(checkpoint)  # what is cached is not the whole model
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    shutil.rmtree(tmp_path / "cache")
    change_json(served.folder / "config.json", quantization_config={"quant_method": "awq"})
    with pytest.raises(BadInput, match=r"quantised weights \(awq\)"):
        examine(checkpoint)
    (served.folder / "model.safetensors").rename(served.folder / "pytorch_model.bin")
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(BadInput, match=r"has no weights in .*pickle"):
        examine(checkpoint)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
