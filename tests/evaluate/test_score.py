"""Scores equal lm-eval's own; what users get wrong is named; the digest follows content."""

import json
import logging
import math
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cfsd.errors import BadInput, NotFinite
from cfsd.evaluate.benchmark import Benchmark
from cfsd.evaluate.benchmark_files import BUNDLED, names_in
from cfsd.evaluate.harness.score import Scores, score

CHOICE = {
    "task": "pick",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "right",
    "metric_list": [
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    ],
}
WRITE = {
    "task": "write",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[right]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
READ = {
    "task": "read",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
}
CONTINUE = {
    "task": "continue",
    "output_type": "loglikelihood",
    "doc_to_text": "{{question}}",
    "doc_to_target": " {{choices[right]}}",
    "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
}
QUESTIONS = [
    "a bad cab",
    "dad had a bag",
    "cab",
    "big idea in a cab",
    "fade",
    "acid bead",
    "hide a head",
    "deaf",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; PAD is EOS, as in the demo model."""
    tokens = ["<s>", "</s>", "?", "\n", " ", *"abcdefghi"]
    characters = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="?"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="?"
    )


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Random weights, large enough that choices differ clearly in likelihood."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, initializer_range=0.8,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        random_model: LlamaForCausalLM = LlamaForCausalLM(config)
    return random_model


def write(folder: Path, settings: dict[str, Any], **changes: Any) -> Path:
    """Write a benchmark whose data file is named relative to its YAML; None drops a setting."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "data/rows.jsonl"}},
        "test_split": "test",
    }
    kept = {key: value for key, value in (data | settings | changes).items() if value is not None}
    path = folder / f"{kept['task']}.yaml"
    path.write_text(yaml.safe_dump(kept))
    (folder / "data").mkdir(exist_ok=True)
    documents = [
        {"question": text, "choices": ["a", "bed", "dice"][: 2 + i % 2], "right": i % 2}
        for i, text in enumerate(QUESTIONS)
    ]
    (folder / "data" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    return path


def by_hand(model: Any, tokenizer: Any, path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, Any]:
    """Return what lm-eval itself says; it looks for data in the working directory."""
    monkeypatch.chdir(path.parent)
    was_training = model.training
    manager = TaskManager(include_path=str(path.parent), include_defaults=False)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3)
    found: dict[str, Any] = simple_evaluate(
        model=lm, tasks=[path.stem], task_manager=manager, bootstrap_iters=0, **options
    )
    model.train(was_training)
    return found


def scores_of(model: Any, tokenizer: Any, folder: Path, name: str, **settings: Any) -> Scores:
    return score(model, tokenizer, Benchmark(name=name, folder=str(folder), **settings), max_tokens=100)


@pytest.mark.parametrize("settings", [CHOICE, WRITE, READ], ids=["choice", "generate", "rolling"])
@pytest.mark.parametrize("limit", [None, 5])
def test_equals_lm_eval_by_hand(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: Any, settings: dict[str, Any], limit: int | None
) -> None:
    path = write(tmp_path / "mine", settings)
    ours = scores_of(model, tokenizer, path.parent, path.stem, limit=limit)
    theirs = by_hand(model, tokenizer, path, monkeypatch, limit=limit)
    metric = ours.metadata["metric"]
    wanted = theirs["results"][path.stem][f"{metric},none"]  # perplexity: e^25, and batches of other sizes
    assert ours.metadata["score"] == (pytest.approx(wanted, rel=1e-5) if settings is READ else wanted)
    samples = theirs["samples"][path.stem]
    assert list(ours.rows["doc_hash"]) == [sample["doc_hash"] for sample in samples]
    assert len(ours.rows) == ours.metadata["num_documents"] == (limit or len(QUESTIONS))
    if settings is READ:
        assert list(ours.rows["value"]) == pytest.approx([-sample[metric][0] for sample in samples], rel=1e-6)
    else:
        assert list(ours.rows["value"]) == [sample[metric] for sample in samples]
        assert ours.rows["value"].mean() == pytest.approx(ours.metadata["score"])


def test_few_examples_equal_lm_eval(model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    path = write(tmp_path, CHOICE, fewshot_split="test")
    ours = scores_of(model, tokenizer, tmp_path, "pick", num_fewshot=2)
    theirs = by_hand(model, tokenizer, path, monkeypatch, num_fewshot=2)
    prompts = [sample["arguments"][0][0] for sample in theirs["samples"]["pick"]]
    assert list(ours.rows["prompt"]) == prompts
    assert all(prompt.count("\n\n") == 2 for prompt in prompts)
    assert ours.metadata["score"] == theirs["results"]["pick"]["acc,none"]


def test_examples_asked_for_count_although_the_yaml_says_none(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    write(tmp_path, CHOICE, fewshot_split="test", num_fewshot=0)
    assert scores_of(model, tokenizer, tmp_path, "pick", num_fewshot=1).metadata["num_fewshot"] == 1


def test_perplexity_counts_tokens_and_sums_nats(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    write(tmp_path, READ)
    rows, metadata, *_ = scores_of(model, tokenizer, tmp_path, "read")
    assert metadata["kind"] == "perplexity" and metadata["chance"] is None and not metadata["higher_is_better"]
    assert list(rows["count"]) == [len(text) for text in QUESTIONS]  # one token per character
    model.eval()
    for text, value in zip(QUESTIONS, rows["value"], strict=True):
        tokens_BT = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(text)]])
        with torch.no_grad():
            mean_loss = model(tokens_BT, labels=tokens_BT).loss
        assert value == pytest.approx(float(mean_loss) * len(text), rel=1e-4)
    model.train()


def test_perplexity_of_continuations_counts_their_tokens_only(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    path = write(tmp_path, CONTINUE)
    rows, metadata = scores_of(model, tokenizer, tmp_path, "continue", metric="perplexity")
    theirs = by_hand(model, tokenizer, path, monkeypatch)
    assert list(rows["count"]) == [len(" a"), len(" bed")] * 4
    assert metadata["score"] == pytest.approx(theirs["results"]["continue"]["perplexity,none"], rel=1e-5)
    assert math.exp(rows["value"].mean()) == pytest.approx(metadata["score"])
    assert scores_of(model, tokenizer, tmp_path, "continue").metadata["metric"] == "acc"


def test_choices_give_chance_kind_and_readable_answers(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    write(tmp_path, CHOICE)
    rows, metadata = scores_of(model, tokenizer, tmp_path, "pick")
    assert (metadata["metric"], metadata["kind"]) == ("acc", "binary")  # although acc_norm is listed first
    assert metadata["chance"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    given = rows["answer"].str.extract(r"^(?P<given>\w+) \[right: (?P<right>\w+)\]$")
    assert list(given["given"] == given["right"]) == list(rows["value"] == 1)
    assert set(given["given"]) <= {"a", "bed", "dice"}
    stated = scores_of(model, tokenizer, tmp_path, "pick", metric="acc_norm", chance=0.1)
    assert (stated.metadata["metric"], stated.metadata["chance"]) == ("acc_norm", 0.1)


def test_filters_have_rows_of_their_own(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    first = {"name": "whole", "filter": [{"function": "take_first"}]}
    second = {
        "name": "letter",
        "filter": [{"function": "regex", "regex_pattern": "([a-c])"}, {"function": "take_first"}],
    }
    write(tmp_path, WRITE, filter_list=[first, second], metadata={"chance": 0})
    rows, metadata = scores_of(model, tokenizer, tmp_path, "write")
    assert metadata["filters"] == ["whole", "letter"] and metadata["chance"] == 0
    assert not rows.duplicated(["filter", "doc_id"]).any() and len(rows) == 2 * len(QUESTIONS)
    assert {name: part["value"].mean() for name, part in rows.groupby("filter")} == pytest.approx(metadata["scores"])


def test_leaves_model_random_states_and_cache_as_they_were(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    write(tmp_path, CHOICE)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    random.seed(7)
    before = random.getstate(), torch.get_rng_state()
    first = scores_of(model, tokenizer, tmp_path, "pick")
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert model.training and not (tmp_path / "cache").exists()
    random.seed(8)
    assert scores_of(model, tokenizer, tmp_path, "pick").rows.equals(first.rows)


def test_needs_no_network(model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    write(tmp_path, CHOICE)

    def refuse(*address: Any, **_: Any) -> None:
        raise AssertionError(f"asked the network for {address}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert len(scores_of(model, tokenizer, tmp_path, "pick").rows) == len(QUESTIONS)


def test_broken_data_is_named(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    write(tmp_path, CHOICE)
    with (tmp_path / "data" / "rows.jsonl").open("a") as file:
        file.write('{"question": \n')
    with pytest.raises(BadInput, match=r"pick\.yaml.*JSON.*correct that file or its data"):
        scores_of(model, tokenizer, tmp_path, "pick")


def test_is_silent_but_for_progress_and_keeps_warnings(
    model: Any, tokenizer: Any, tmp_path: Path, capfd: Any, caplog: Any
) -> None:
    reported: list[tuple[int, int]] = []
    for settings, total in ((CHOICE, 20), (READ, 8), (WRITE, 8)):
        reported.clear()
        name = write(tmp_path, settings).stem
        benchmark = Benchmark(name=name, folder=str(tmp_path))
        score(model, tokenizer, benchmark, max_tokens=20, on_progress=lambda done, of: reported.append((done, of)))
        assert reported[-1] == (total, total) and reported == sorted(reported) and len(reported) > 2
    write(tmp_path, CHOICE, doc_to_text="{{question * 9}}")
    with caplog.at_level(logging.INFO):
        cut = scores_of(model, tokenizer, tmp_path, "pick")
    assert any("context of 64 tokens and were cut" in remark for remark in cut.metadata["remarks"])
    assert capfd.readouterr() == ("", "") and not [r for r in caplog.records if r.name.startswith("lm_eval")]


def test_nan_weights_are_not_scored_as_the_first_choice(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    write(tmp_path, CHOICE)
    broken = LlamaForCausalLM(model.config)
    broken.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(NotFinite, match=r"pick, document 0.*nan"):
        scores_of(broken, tokenizer, tmp_path, "pick")


@pytest.mark.parametrize(
    ("settings", "changes", "options", "message"),
    [
        (CHOICE, {}, {"metric": "f1"}, "metric f1 is not among its metrics; usable are acc_norm, acc"),
        (
            CHOICE,
            {"metric_list": [{"metric": "f1"}, {"metric": "acc"}]},
            {"metric": "f1"},
            "no average.*usable are acc",
        ),
        (CHOICE, {"metric_list": [{"metric": "f1"}]}, {}, "no metric is an average over documents"),
        (CHOICE, {"doc_to_text": "{{missing}}"}, {}, "pick.yaml.*missing.*correct that file"),
        (CHOICE, {"output_type": "choice"}, {}, "output_type 'choice'"),
        (CHOICE, {"test_split": "tset"}, {}, "tset"),
        (
            CHOICE,
            {"fewshot_split": "test"},
            {"num_fewshot": 8},
            "num_fewshot 8 needs 9 documents.*there are 8",
        ),
        (WRITE, {"unsafe_code": True}, {}, "runs code that the model writes"),
    ],
)
def test_what_cannot_be_scored_is_named(
    model: Any, tokenizer: Any, tmp_path: Path,
    settings: dict[str, Any], changes: dict[str, Any], options: dict[str, Any], message: str,
) -> None:  # fmt: skip
    name = write(tmp_path, settings, **changes).stem
    with pytest.raises(BadInput, match=message):
        scores_of(model, tokenizer, tmp_path, name, **options)


def test_check_names_what_is_wrong(tmp_path: Path) -> None:
    path = write(tmp_path, CHOICE)
    mine = Benchmark(name="pick", folder=str(tmp_path))
    mine.check()
    data = tmp_path / "data" / "rows.jsonl"
    lines = data.read_bytes()
    data.write_text("\n")
    with pytest.raises(BadInput, match=r"rows\.jsonl is empty"):
        mine.check()
    data.unlink()
    with pytest.raises(BadInput, match=r"no data file .*data/rows\.jsonl"):
        mine.check()
    data.write_bytes(lines)
    path.write_text("task: pick\nmetric_list: [\n")
    with pytest.raises(BadInput, match=r"pick\.yaml, line 3: not valid YAML"):
        mine.check()
    with pytest.raises(BadInput, match=r"no folder .*elsewhere"):
        Benchmark(name="pick", folder=str(tmp_path / "elsewhere")).check()


def test_unknown_names_are_answered_with_the_known_ones(tmp_path: Path) -> None:
    write(tmp_path, CHOICE)
    write(tmp_path, READ)
    with pytest.raises(BadInput, match=r"no benchmark 'pikc'.*only pick, read"):
        Benchmark(name="pikc", folder=str(tmp_path)).check()
    with pytest.raises(BadInput, match=f"bundled are .*{names_in(BUNDLED)[-1]}"):
        Benchmark(name="no_such_benchmark_anywhere").check()


def test_groups_and_tags_are_refused_with_their_members(tmp_path: Path) -> None:
    write(tmp_path, CHOICE, tag="letters")
    write(tmp_path, READ, tag=["letters", "other"])
    (tmp_path / "both.yaml").write_text("group: both\ntask: [pick, {task: read, num_fewshot: 1}]\n")
    for name in ("both", "letters"):
        with pytest.raises(BadInput, match=r"several.*pick, read"):
            Benchmark(name=name, folder=str(tmp_path)).check()


def test_hub_benchmarks_are_found_without_a_folder() -> None:
    hellaswag = Benchmark(name="hellaswag")
    hellaswag.check()
    assert hellaswag.digest() == Benchmark(name="hellaswag").digest() != Benchmark(name="piqa").digest()
    with pytest.raises(BadInput, match="mmlu is a group"):
        Benchmark(name="mmlu").check()


def test_a_string_is_a_name() -> None:
    assert Benchmark.model_validate("piqa") == Benchmark(name="piqa")


def test_checking_a_recipe_imports_nothing_heavy() -> None:
    """A mere `--plan` must answer at once."""
    code = (
        "import sys; from cfsd.evaluate import Benchmark; b = Benchmark(name='facts'); b.check(); b.digest(); "
        "sys.exit(str({'lm_eval', 'torch', 'pandas', 'transformers', 'datasets'} & set(sys.modules) or ''))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == ""


def test_digest_follows_content_and_settings_but_not_the_place(tmp_path: Path) -> None:
    write(tmp_path / "a", CHOICE, include="base.yaml", process_docs=None)
    (tmp_path / "a" / "base.yaml").write_text("process_docs: !function clean.drop\n")
    (tmp_path / "a" / "clean.py").write_text("def drop(documents):\n    return documents\n")
    shutil.copytree(tmp_path / "a", tmp_path / "b" / "c")
    first = Benchmark(name="pick", folder=str(tmp_path / "a"))
    moved = Benchmark(name="pick", folder=str(tmp_path / "b" / "c"))
    assert first.digest() == moved.digest()
    seen = {first.digest(), Benchmark(name="pick", folder=first.folder, limit=3).digest()}
    for name in ("pick.yaml", "base.yaml", "clean.py", "data/rows.jsonl"):
        file = tmp_path / "b" / "c" / name
        file.write_bytes(file.read_bytes() + (b" " if name.endswith("jsonl") else b"# \n"))
        seen.add(moved.digest())
    assert len(seen) == 6


def test_functions_and_includes_work_as_in_lm_eval(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    write(tmp_path, CHOICE, include="base.yaml")
    (tmp_path / "base.yaml").write_text("process_docs: !function clean.short\n")
    (tmp_path / "clean.py").write_text("def short(documents):\n    return documents.select(range(3))\n")
    assert scores_of(model, tokenizer, tmp_path, "pick").metadata["num_documents"] == 3
    (tmp_path / "base.yaml").write_text("include: pick.yaml\n")
    with pytest.raises(BadInput, match="includes itself"):
        Benchmark(name="pick", folder=str(tmp_path)).check()


@pytest.mark.parametrize("name", names_in(BUNDLED))
def test_bundled_benchmarks_are_whole(name: str) -> None:
    Benchmark(name=name).check()
