"""The recipes of published settings, run whole on small random models whose architecture and tokenizer behave alike."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, OlmoConfig, OlmoForCausalLM
from transformers import PreTrainedTokenizerFast as Fast

from cfsd.machine import Machine
from cfsd.overrides import override, read_yaml, validated
from cfsd.recipe import Recipe
from cfsd.report.summarise import summarise
from cfsd.store.artifact import Artifact, Store
from cfsd.store.tables import read_rows
from flows._conclude import Result
from tests.conftest import ROOT

CPU = Machine(device="cpu", threads=1, micro_batch_tokens=2048)
CHARACTERS = [*map(chr, range(32, 127)), "\n"]
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.3,
}  # fmt: skip
SMALLER = {
    "target.kind": "file", "target.name": None, "target.revision": None, "target.subset": None,
    "target.rows": 40, "target.held_out": 8, "target.max_length": 400, "probe.rows": 32,
    "probe.length": 40, "generate.rows": 48, "generate.length": 40, "mix.target_rows": 8, "mix.rehearsal_tokens": 160,
    "evaluate.held_out_rows": 8, "train.learning_rate": 1e-3,
}  # fmt: skip
BAR = "\uff5c"  # in R1's tokens, where others have the one of ASCII
BEGIN, END, USER, ASSISTANT = (
    f"<{BAR}{word}{BAR}>" for word in ("begin▁of▁sentence", "end▁of▁sentence", "User", "Assistant")
)
THINKS = (  # thoughts of earlier turns are left out; the turn that is to be written opens with a thought
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}{% else %}"
    "{{ '<|Assistant|>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"
).replace("|", BAR)


def tokenizer(first: list[str], added: list[str], **roles: str) -> Fast:
    """Return a tokenizer of single characters, with special tokens that have the first ids, and ordinary added ones."""
    raw = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*first, *CHARACTERS])}, unk_token=" "))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    raw.add_special_tokens(first)
    raw.add_tokens([AddedToken(token, normalized=False) for token in added])
    return Fast(tokenizer_object=raw, **roles)


def olmo(folder: Path) -> Path:
    """Write an OLMo: no start token, its documents separated by the end token, norms without weights, tied."""
    words = tokenizer(["<|padding|>", "<|endoftext|>"], [], eos_token="<|endoftext|>", pad_token="<|padding|>")
    torch.manual_seed(0)
    config = OlmoConfig(**SIZES, vocab_size=len(words), pad_token_id=0, eos_token_id=1, tie_word_embeddings=True)
    config.bos_token_id = None
    OlmoForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def r1(folder: Path) -> Path:
    """Write a Llama with R1's tokens and template, whose tokenizer begins every text by itself."""
    words = tokenizer([BEGIN, END], [USER, ASSISTANT, "<think>", "</think>"], bos_token=BEGIN, eos_token=END)
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(f"{BEGIN} $A", special_tokens=[(BEGIN, 0)])
    words.chat_template = THINKS
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, vocab_size=len(words), bos_token_id=0, eos_token_id=1, tie_word_embeddings=False)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.95, bos_token_id=0, eos_token_id=1
    )
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def written(path: Path, *columns: str) -> Path:
    """Write rows of `columns` as the data set has them, each a text of its own."""
    rows = [{name: f"{name} {chr(97 + i % 26) * (1 + i % 5)}" for name in columns} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def stand_ins(folder: Path) -> Path:
    """Write two benchmarks by the names of lm-eval's own, whose data are on a hub."""
    folder.mkdir()
    questions = [{"question": f"{i} plus {i}?", "answer": f"a{2 * i}"} for i in range(4)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    data: Any = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "sums.jsonl"}}, "test_split": "test"}
    asked = data | {"doc_to_text": "{{question}}", "doc_to_target": "{{answer}}", "metric_list": [
        {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]}  # fmt: skip
    gsm8k = asked | {"task": "gsm8k", "output_type": "generate_until", "generation_kwargs": {"max_gen_toks": 8}}
    chosen = asked | {"task": "arc_easy", "output_type": "multiple_choice", "doc_to_choice": ["a0", "a2", "a4", "a6"],
                      "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}  # fmt: skip
    for config in (gsm8k, chosen):
        (folder / f"{config['task']}.yaml").write_text(yaml.safe_dump(config))
    return folder


def run_whole(name: str, changes: dict[str, Any]) -> tuple[Recipe, Result]:
    from flows.mitigate import mitigate

    content = read_yaml(ROOT / "deployments" / "recipes" / f"{name}.yaml")
    recipe = validated(Recipe, override(content, SMALLER | changes), name)
    return recipe, mitigate(recipe, CPU)


def rows_of(store: Store, artifact: Artifact, table: str) -> list[dict[str, Any]]:
    return read_rows(store.path(artifact), table)


def counted(words: Fast, rows: list[dict[str, Any]]) -> tuple[int, int]:
    """Return in how many rows `<think>` is, and in how many no `</think>` follows the last one."""
    opened, closed = words.convert_tokens_to_ids(["<think>", "</think>"])
    ends = [row["token_ids"][::-1] for row in rows if opened in row["token_ids"]]
    return len(ends), sum(closed not in end[: end.index(opened)] for end in ends)


def test_olmo_on_metamath_writes_and_learns_without_a_start_token(home: Path, server: str, tmp_path: Path) -> None:
    rows = written(tmp_path / "metamath.jsonl", "query", "response", "original_question", "type")
    folder = str(stand_ins(tmp_path / "benchmarks"))
    benchmarks = [{"name": name, "folder": folder} for name in ("gsm8k", "arc_easy")]
    base = str(olmo(tmp_path / "olmo"))
    recipe, result = run_whole(
        "olmo-1b-metamath", {"base": base, "target.path": str(rows), "evaluate.benchmarks": benchmarks}
    )
    run, store = result.only(), Store(home)
    stages = Counter(step.stage for step in run.steps if step.executed)
    assert stages.keys() >= {"fetch", "target", "generate", "filter", "probe", "mix", "train", "evaluate"}
    assert "chat" not in stages and stages["evaluate"] == 4 and recipe.train.rehearsal.loss == "nll"

    made = run.artifacts
    assert made["base"].metadata["start_token"] == 1 and made["base"].metadata["end_tokens"] == [1]
    said: Any = made["base"].metadata["said"]
    assert any(
        "'<|endoftext|>'" in line and "the document separator; the tokenizer has no BOS" in line for line in said
    )
    for role in ("corpus", "probe"):
        ids = [row["token_ids"] for row in rows_of(store, made[role], "corpus")]
        assert len(ids) > 30 and all(row[0] == 1 and 1 not in row[1:-1] for row in ids)
    words = Fast.from_pretrained(base)
    learned = rows_of(store, made["target"], "train")[0]
    assert words.decode(learned["token_ids"]).startswith("Question: query ")
    answer = [t for t, counts in zip(learned["token_ids"], learned["supervised"], strict=True) if counts]
    assert words.decode(answer).startswith(" response ") and answer[-1] == 1

    (summary,) = result.summaries
    assert summary.probe_kl and summary.probe_kl["low"] > 0 and summary.target_gain and summary.target_gain["low"] > 0
    assert summary.benchmarks.keys() == {"gsm8k", "arc_easy"} and summary.chat_kl is None
    assert OlmoForCausalLM.from_pretrained(store.path(made["final"])).config.bos_token_id is None


def test_r1_on_medreason_counts_reasoning_that_does_not_end(home: Path, server: str, tmp_path: Path) -> None:
    columns = ("dataset_name", "id_in_dataset", "question", "answer", "reasoning", "options")
    base = str(r1(tmp_path / "r1"))
    content = read_yaml(ROOT / "deployments" / "recipes" / "r1-distill-llama-8b-medreason.yaml")
    ours = next(b for b in content["evaluate"]["benchmarks"] if b["name"] == "instructions")
    recipe, result = run_whole("r1-distill-llama-8b-medreason", {
        "base": base, "target.path": str(written(tmp_path / "medreason.jsonl", *columns)), "probe.modes":
        ["unprompted", {"name": "chat", "rows": 64, "length": 160}], "evaluate.benchmarks": [
            ours | {"limit": 8, "max_gen_toks": 80}],
    })  # fmt: skip
    run, store, words = result.only(), Store(home), Fast.from_pretrained(base)
    made, (summary,) = run.artifacts, result.summaries

    learned = rows_of(store, made["target"], "train")[0]
    text = words.decode(learned["token_ids"])
    assert text.startswith(f"{BEGIN}{USER}question ") and text.count(BEGIN) == 1 and text.endswith(END)
    answer = [t for t, counts in zip(learned["token_ids"], learned["supervised"], strict=True) if counts]
    assert words.decode(answer).startswith("reasoning ") and "\n</think>\n\nanswer " in words.decode(answer)

    chats = rows_of(store, made["chat"], "corpus")
    thoughts, endless = counted(words, chats)
    assert 0 < endless < thoughts <= 64
    metadata: Any = made["chat"].metadata
    for role in ("chat", "corpus", "probe"):  # without a prompt, too, a random model opens thoughts
        known: Any = made[role].metadata
        assert (known["reasoning"], known["unfinished"]) == counted(words, rows_of(store, made[role], "corpus"))
    assert any(f"in {endless} of {thoughts} rows with reasoning, </think>" in s for s in metadata["said"])
    assert summary.chats and (summary.chats["reasoning"], summary.chats["unfinished"]) == (thoughts, endless)
    page = " ".join((result.folder / "report.html").read_text().split())
    assert f"In {endless} of {thoughts} the base model's reasoning did not end in time" in page
    for role in ("base", "tuned"):
        assert 0 < summary.answers["instructions"][role]["unfinished"] <= 1
    user = words.convert_tokens_to_ids(USER)
    assert {tuple(row["token_ids"][:2]) for row in chats} == {(0, user)}  # the template's start token, not another
    assert summary.chat_kl and summary.chat_kl["low"] > 0 and recipe.probe.modes[1].name == "chat"
    assert summarise(store, run).target_gain == summary.target_gain
