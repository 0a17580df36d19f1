"""Corpora in the forms of other trainers: the same tokens and masks, read back and by the real libraries."""

import json
import os
import subprocess
import sys
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from cfsd.data.stage import prepare
from cfsd.data.target import Target
from cfsd.errors import BadInput
from cfsd.generate.spec import GenerateSpec
from cfsd.generate.stage import generate
from cfsd.integrations import formats
from cfsd.integrations.corpus import check_stored, corpus_folder
from cfsd.integrations.formats import token_rows, write_corpus
from cfsd.machine import Machine
from cfsd.model.loading import load_model
from cfsd.store.artifact import Artifact, Store
from cfsd.store.tables import CORPUS, read_rows, shards, table_of, write_shard
from cfsd.train.spec import RehearsalSpec
from tests.conftest import ROOT, fetched, save_model, write_rows

MACHINE = Machine(device="cpu", threads=1)
ROWS, K = 24, 6


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def base(store: Store, model_folder: Path) -> Artifact:
    return fetched(store, model_folder)


def corpus_in(store: Store, base: Artifact, key: str, file: Path, **spec: Any) -> Path:
    """Sampled as a recipe does, with the model recorded as what it was made from."""
    wanted, sampling = Target(path=str(write_rows(file)), held_out=8, seed=0), GenerateSpec(length=10, seed=0, **spec)
    target = store.make("target", "t" * 16, lambda draft: prepare(base, wanted, draft))[0]
    work = lambda draft: generate(base, target, sampling, draft, MACHINE)  # noqa: E731
    return store.path(store.make("corpus", key, work, inputs=[base, target])[0])


@pytest.fixture(scope="module", params=["context-free", "contextual"])
def corpus(request: pytest.FixtureRequest, store: Store, base: Artifact, tmp_path_factory: Any) -> Path:
    key = {"context-free": "a" * 16, "contextual": "b" * 16}[request.param]
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    return corpus_in(store, base, key, rows, rows=ROWS, top_logprobs=K, source=request.param)


def wanted_of(corpus: Path) -> list[tuple[list[int], list[int]]]:
    rows = read_rows(corpus, "corpus", ["token_ids", "logprobs", "finish_reason"])
    assert {"eos", "length"} == {row["finish_reason"] for row in rows}
    for row in rows:  # what was cut has no EOS: token 1
        assert (row["token_ids"][-1] == 1) == (row["finish_reason"] == "eos")
    return [
        (row["token_ids"], [-100 if p is None else t for t, p in zip(row["token_ids"], row["logprobs"], strict=True)])
        for row in rows
    ]


def test_a_corpus_that_only_the_shared_store_holds_is_brought(
    store: Store, base: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CFSD_STORE", f"file://{tmp_path}/shared")
    corpus = corpus_in(Store(tmp_path / "one"), fetched(Store(tmp_path / "one"), store.path(base)), "c" * 16,
                       tmp_path / "rows.jsonl", rows=4, source="context-free")  # fmt: skip
    for asked in ("c" * 16, tmp_path / "three" / "store" / "corpus" / ("c" * 16)):
        home = tmp_path / ("two" if isinstance(asked, str) else "three")
        monkeypatch.setenv("CFSD_HOME", str(home))
        assert Store(home).find("corpus", "c" * 16)
        assert not shards(home / "store" / "corpus" / ("c" * 16), "corpus")
        assert read_rows(corpus_folder(asked), "corpus") == read_rows(corpus, "corpus")


def test_a_corpus_without_rows_and_one_that_is_not_finished_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_shard(tmp_path / "empty", "corpus", 0, table_of(CORPUS, []))
    with pytest.raises(BadInput, match="has no rows, so there is nothing to rehearse"):
        check_stored(tmp_path / "empty", RehearsalSpec())
    (tmp_path / "empty").rename(tmp_path / "empty.draft")
    with pytest.raises(BadInput, match="holds no corpus"):
        corpus_folder(tmp_path / "empty.draft")


def test_a_home_in_a_path_is_the_users(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_corpus(corpus, Path("~/out"), "trl")
    assert (tmp_path / "out" / "corpus.parquet").exists()


@pytest.mark.parametrize("jsonl", [False, True])
def test_tokens_and_labels_are_those_of_the_corpus(corpus: Path, tmp_path: Path, *, jsonl: bool) -> None:
    (said,) = write_corpus(corpus, tmp_path / "out", "trl", jsonl=jsonl)
    kind, name = ("json", "corpus.jsonl") if jsonl else ("parquet", "corpus.parquet")
    assert said == f"{name}: input_ids, labels"
    found = load_dataset(kind, data_files=str(tmp_path / "out" / name), split="train", cache_dir=str(tmp_path / "hf"))
    wanted = wanted_of(corpus)
    assert [(row["input_ids"], row["labels"]) for row in found] == wanted
    assert all(labels[0] == -100 for _, labels in wanted) and len(wanted) == ROWS


def test_a_folder_that_holds_something_is_left_alone(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(BadInput, match="exists and is not an empty folder"):
        write_corpus(corpus, tmp_path, "trl")


def test_what_failed_leaves_nothing_behind(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a file lay there, and the same command was refused for it."""
    monkeypatch.setattr(
        formats, "token_rows", lambda corpus: chain(islice(token_rows(corpus), 3), ({}[row] for row in "x"))
    )
    with pytest.raises(KeyError):
        write_corpus(corpus, tmp_path / "out", "trl", jsonl=True)
    assert not [*tmp_path.iterdir()]
    monkeypatch.undo()
    (tmp_path / "out").mkdir()
    write_corpus(corpus, tmp_path / "out", "trl", jsonl=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "corpus.jsonl"]


def test_a_corpus_without_rows_is_refused(store: Store, base: Artifact, tmp_path: Path) -> None:
    """As one of which a filter rejected all."""
    work = lambda draft: write_shard(draft.folder, "corpus", 0, table_of(CORPUS, []))  # noqa: E731
    empty = store.path(store.make("corpus", "e" * 16, work, inputs=[base])[0])
    with pytest.raises(BadInput, match=r"the corpus e+ has no rows"):
        write_corpus(empty, tmp_path / "out", "trl")
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_the_distributions_for_axolotl_are_those_of_the_next_token(
    store: Store, base: Artifact, corpus: Path, tmp_path: Path
) -> None:
    """Entry t is compared with the model's logits after token t: at the base it is theirs, scaled to the top."""
    said = write_corpus(corpus, tmp_path / "out", "axolotl")
    assert said[0] == "corpus.parquet: input_ids, labels, attention_mask" and said[1].startswith("corpus-kd.parquet:")
    file = str(tmp_path / "out" / "corpus-kd.parquet")
    model: Any = load_model(store.path(base), "cpu", "float32").eval()
    for row in load_dataset("parquet", data_files=file, split="train", cache_dir=str(tmp_path / "hf")):
        law_TV = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        mask_TK = torch.tensor(row["target_mask"], dtype=torch.bool)
        assert mask_TK.any(1).tolist() == [label != -100 for label in row["labels"][1:]] + [False]
        own_TK = law_TV.gather(1, torch.tensor(row["target_token_ids"])).log_softmax(-1)
        target_TK = torch.tensor(row["target_logprobs"])
        counted_T = mask_TK.any(1)
        assert mask_TK[counted_T].all()
        assert torch.allclose(target_TK[counted_T], own_TK[counted_T], atol=4e-3)  # stored in float16
        assert torch.allclose(target_TK[counted_T].exp().sum(1), torch.ones(int(counted_T.sum())), atol=1e-5)


def test_without_distributions_there_is_nothing_for_the_kd_plugin(store: Store, base: Artifact, tmp_path: Path) -> None:
    bare = corpus_in(store, base, "c" * 16, tmp_path / "rows.jsonl", rows=4)
    assert write_corpus(bare, tmp_path / "out", "axolotl") == ["corpus.parquet: input_ids, labels, attention_mask"]
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["corpus.parquet"]


def test_text_is_written_where_it_gives_the_same_tokens(corpus: Path, tmp_path: Path, base: Artifact) -> None:
    """Every character is a token here: all rows can be written, the start token and EOS as they are called."""
    said = write_corpus(corpus, tmp_path / "out", "llama-factory")
    assert said == [f"cfsd_rehearsal.jsonl: {ROWS} of {ROWS} rows as text, to be read with `template: empty`"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "cfsd_rehearsal.jsonl").read_text().splitlines()]
    assert {row["instruction"] for row in rows} == {"<bos>"} or corpus.name[0] == "b"  # contextual: with prompts
    assert {row["input"] for row in rows} == {""}
    ended = [ids[-1] == 1 for ids, _ in wanted_of(corpus)]
    assert [row["output"].endswith("<eos>") for row in rows] == ended
    info = json.loads((tmp_path / "out" / "dataset_info.json").read_text())["cfsd_rehearsal"]
    assert info["file_name"] == "cfsd_rehearsal.jsonl"


def joining(folder: Path) -> Path:
    """A model whose tokenizer joins a and b."""
    save_model(folder)
    raw = Tokenizer(models.BPE({"<bos>": 0, "<eos>": 1, "a": 2, "b": 3, "ab": 4}, [("a", "b")]))
    raw.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>").save_pretrained(folder)
    return folder


def test_rows_that_text_would_change_are_counted_or_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "data")
    base = fetched(store, joining(tmp_path / "model"))
    sampled = {(0, 4, 1): "eos", (0, 3, 2): "length", (0, 2, 3, 1): "eos"}  # of the last a and b come as ab again
    rows = [corpus_row(n, ids, [None] + [-1.0] * (len(ids) - 1), end) for n, (ids, end) in enumerate(sampled.items())]
    rows.append(corpus_row(3, (0, 3, 2, 1), [None, -1.0, None, -1.0], "eos"))

    def made(key: str, rows: list[dict[str, Any]]) -> Path:
        work = lambda draft: write_shard(draft.folder, "corpus", 0, table_of(CORPUS, rows))  # noqa: E731
        return store.path(store.make("corpus", key * 16, work, inputs=[base])[0])

    assert write_corpus(made("a", rows), tmp_path / "out", "llama-factory") == [
        "cfsd_rehearsal.jsonl: 2 of 4 rows as text, to be read with `template: empty`",
        "left out: 1 of 4 rows, whose text gives other tokens than were sampled",
        "left out: 1 of 4 rows, whose prompt is not at their beginning alone",
    ]
    kept = [json.loads(line)["output"] for line in (tmp_path / "out" / "cfsd_rehearsal.jsonl").read_text().splitlines()]
    assert kept == ["ab<eos>", "ba"]
    with pytest.raises(BadInput, match=r"none of the 1 rows .* \(1 whose text gives other tokens than were sampled\)"):
        write_corpus(made("b", rows[2:3]), tmp_path / "no", "llama-factory")
    assert not (tmp_path / "no").exists()


def corpus_row(number: int, ids: tuple[int, ...], logprobs: list[Any], end: str) -> dict[str, Any]:
    plain = {"source": "context-free", "shard": 0, "seed": 0, "text": ""}
    return plain | {"row_id": number, "token_ids": list(ids), "logprobs": logprobs, "finish_reason": end}


def test_the_base_of_a_filtered_corpus_is_found_behind_it(
    store: Store, base: Artifact, corpus: Path, tmp_path: Path
) -> None:
    kept = store.find("corpus", corpus.name)
    assert kept
    copy = lambda draft: [(draft.folder / f.name).write_bytes(f.read_bytes()) for f in corpus.glob("*.parquet")]  # noqa: E731
    filtered = store.make("corpus", f"f{corpus.name[1:]}", copy, inputs=[kept])[0]  # type: ignore[arg-type]
    write_corpus(store.path(filtered), tmp_path / "out", "llama-factory")
    alone = store.make("corpus", f"0{corpus.name[1:]}", copy)[0]  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=r"the base of .* is not in its store, and its tokenizer is needed"):
        write_corpus(store.path(alone), tmp_path / "no", "llama-factory")


@pytest.mark.processes
def test_the_command_writes_the_corpus_and_says_what(store: Store, base: Artifact, tmp_path: Path) -> None:
    corpus = corpus_in(store, base, "c" * 16, tmp_path / "rows.jsonl", rows=4)
    words = ["corpus", corpus.name[:9], "--to", str(tmp_path / "out"), "--jsonl", "--home", str(store.home)]
    command = [sys.executable, "-m", "flows.export", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["corpus.jsonl: input_ids, labels", str(tmp_path / "out")]


def by(python: str, script: str, *words: object) -> str:
    """Run `script` by the interpreter that the environment variable `python` names, which has a peer's packages."""
    if python not in os.environ:
        pytest.skip(f"{python} does not name an interpreter")
    done = subprocess.run([os.environ[python], "-c", script, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


AXOLOTL = """
import sys
from datasets import load_dataset
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from axolotl.integrations.kd.collator import DataCollatorForKD
from axolotl.integrations.kd.topk_logprob.forward_kl import loss

folder, base = sys.argv[1:]
plain, taught = (load_dataset("parquet", data_files=f"{folder}/{name}.parquet", split="train")
                 for name in ("corpus", "corpus-kd"))
assert set(plain.features) == {"input_ids", "attention_mask", "labels"}  # by which axolotl knows what is tokenised
rows = [taught[i] for i in range(len(taught))]
batch = DataCollatorForKD(AutoTokenizer.from_pretrained(base))(rows)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
with torch.no_grad():
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
names = ("target_token_ids", "target_logprobs", "target_mask")
ids, target, mask = (batch[name] for name in names)
top = logits.gather(2, ids) .log_softmax(-1)  # kd_normalize_topk
scaled = torch.full_like(logits, -1e9).scatter(2, ids, top)
counted = mask.bool().any(-1)
print(float(loss(scaled[counted][None], ids[counted][None], target[counted][None], mask[counted][None])),
      int(counted.sum()), int((batch["labels"][:, 1:] != -100).sum()))
"""


@pytest.mark.slow
def test_axolotl_reads_it(store: Store, base: Artifact, corpus: Path, tmp_path: Path) -> None:
    """Its collator and its own loss: at the base the distillation loss is 0."""
    write_corpus(corpus, tmp_path / "out", "axolotl")
    loss, counted, labelled = by("CFSD_AXOLOTL_PYTHON", AXOLOTL, tmp_path / "out", store.path(base)).split()
    assert abs(float(loss)) < 1e-4 and counted == labelled


LLAMA_FACTORY = """
import importlib.machinery, json, os, sys, types
os.environ["DISABLE_VERSION_CHECK"] = "1"  # it asks for older versions than are here
audio = types.ModuleType("torchaudio")  # needed by its audio models alone; its build does not fit this torch
audio.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
sys.modules["torchaudio"] = audio
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import DataArguments, ModelArguments
from transformers import AutoTokenizer, Seq2SeqTrainingArguments

folder, base, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
data = DataArguments(template="empty", dataset="cfsd_rehearsal", dataset_dir=folder, cutoff_len=512)
template = get_template_and_fix_tokenizer(tokenizer, data)
args = Seq2SeqTrainingArguments(output_dir=out, report_to=[], use_cpu=True)
found = get_dataset(template, ModelArguments(model_name_or_path=base), data, args, stage="sft", tokenizer=tokenizer)
print("\\n" + json.dumps([[row["input_ids"], row["labels"]] for row in found["train_dataset"]]))
"""


@pytest.mark.slow
def test_llama_factory_makes_the_same_tokens_of_it(store: Store, base: Artifact, corpus: Path, tmp_path: Path) -> None:
    write_corpus(corpus, tmp_path / "out", "llama-factory")
    words = tmp_path / "out", store.path(base), tmp_path / "scratch"
    found = json.loads(by("CFSD_LLAMA_FACTORY_PYTHON", LLAMA_FACTORY, *words).strip().split("\n")[-1])
    assert [tuple(row) for row in found] == [tuple(row) for row in wanted_of(corpus)]
