"""Inputs of kinds that people bring, each made from one good case by one change, and what becomes of it.

`docs/refusals.py` runs them and writes the page; `tests/flows/test_inputs.py` runs them as a test.
"""

import gzip
import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

RECIPE = """name: mine
base: ./model
target: {path: rows.jsonl, held_out: 4}
probe: {rows: 8, length: 8}
generate: {rows: 8, length: 8}
mix: {target_rows: 8, rehearsal_tokens: 32}
train: {learning_rate: 1.0e-3, epochs: 1}
"""
CHAT = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}:{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant:{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('system role is not supported') }}{% endif %}"
BENCHMARK: dict[str, Any] = {
    "task": "sums",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "sums.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}} =",
    "doc_to_target": "answer",
    "doc_to_choice": "{{choices}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
Build = Callable[[Path], None]


class Input(NamedTuple):
    """One input: what it is, in words; how the good case in a folder becomes it; what is to be seen.

    `refused` is a part of the message of a run that ends with exit code 2; without it the run completes and `said`
    is a part of a line that it prints. `{folder}` in an environment variable is the case's folder.
    """

    what: str
    build: Build
    refused: str = ""
    said: str = ""
    environment: Mapping[str, str] = {}


def make(folder: Path) -> Path:
    """Write the good case: a random two-layer model with a character vocabulary, rows and a recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    save(folder / "model")
    write(folder, [{"prompt": f"say {word} =", "response": f" {word[::-1]}"} for word in words()])
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def words(count: int = 24) -> list[str]:
    """Return `count` words of four letters, no two alike."""
    return ["".join(chr(97 + (i * 5 + j * (3 + i)) % 26) for j in range(4)) for i in range(count)]


def save(folder: Path, template: str = CHAT) -> None:
    """Write an untied Llama of two layers and a tokenizer of single characters with a chat template."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    special = ["<unk>", "<bos>", "<eos>", "<|turn|>", "<|end|>"]
    characters = [*map(chr, range(32, 127)), "\n"]
    raw = Tokenizer(models.WordLevel({token: i for i, token in enumerate([*special, *characters])}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>",
        additional_special_tokens=special[3:],
    )  # fmt: skip
    tokenizer.chat_template = template
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(special) + len(characters), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write(folder: Path, records: list[dict[str, Any]]) -> None:
    """Write the target's rows."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def field(folder: Path, **fields: str) -> None:
    """Set fields of the recipe, each to a text of YAML."""
    recipe = folder / "recipe.yaml"
    kept = [line for line in recipe.read_text().splitlines() if line.partition(":")[0] not in fields]
    recipe.write_text("\n".join([*kept, *(f"{name}: {value}" for name, value in fields.items())]) + "\n")


def edit(path: Path, **fields: Any) -> None:
    """Change fields of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def tensors(change: Callable[[dict[str, Any]], dict[str, Any]], folder: Path) -> None:
    """Change the model's weights."""
    from safetensors.torch import load_file, save_file

    file = folder / "model" / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def without(name: str, weights: dict[str, Any]) -> dict[str, Any]:
    """Return the weights but one."""
    return {key: value for key, value in weights.items() if key != name}


def model_field(name: str, folder: Path, **fields: Any) -> None:
    """Change fields of one of the model's JSON files."""
    edit(folder / "model" / name, **fields)


def cut(folder: Path) -> None:
    file = folder / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def pointer(folder: Path) -> None:
    (folder / "model" / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )


def shard(folder: Path) -> None:
    absent = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(absent))


def pickled(folder: Path) -> None:
    (folder / "model" / "model.safetensors").rename(folder / "model" / "pytorch_model.bin")


def adapter(folder: Path) -> None:
    edited = {"peft_type": "LORA", "base_model_name_or_path": "./base", "r": 4}
    (folder / "model" / "adapter_config.json").write_text(json.dumps(edited))
    (folder / "model" / "model.safetensors").rename(folder / "model" / "adapter_model.safetensors")


def more_tokens(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.add_tokens(["<|added|>"], special_tokens=True)
    tokenizer.save_pretrained(folder / "model")


def other_kind(name: str, folder: Path) -> None:
    """Put a small random model of another kind in the place of the good one, with the same tokenizer."""
    import transformers

    sizes = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4}  # fmt: skip
    if name == "T5":
        config: Any = transformers.T5Config(vocab_size=101, d_model=32, d_ff=64, num_layers=2, num_heads=4, d_kv=8)
        model: Any = transformers.T5ForConditionalGeneration(config)
    elif name == "Bert":
        model = transformers.BertLMHeadModel(transformers.BertConfig(**sizes, bos_token_id=1, eos_token_id=2))
    else:
        config = transformers.RwkvConfig(vocab_size=101, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32)
        model = transformers.RwkvForCausalLM(config)
    (folder / "model" / "model.safetensors").unlink()
    model.save_pretrained(folder / "model")


def chats(make: Callable[[str], dict[str, Any]], folder: Path) -> None:
    """Make the rows chats, one of each word."""
    write(folder, [make(word) for word in words()])
    field(folder, target="{path: rows.jsonl, messages: messages, held_out: 4}")


def turns(word: str, *, first: dict[str, Any] | None = None, **assistant: Any) -> list[dict[str, Any]]:
    """Return a chat of two messages, with one before them."""
    said = {"role": "assistant", "content": word[::-1]} | assistant
    return [*([first] if first else []), {"role": "user", "content": word}, said]


def pairs(make: Callable[[str], dict[str, Any]], folder: Path) -> None:
    """Make the rows others, one of each word."""
    write(folder, [make(word) for word in words()])


def text(name: str, content: bytes, folder: Path) -> None:
    """Take another file as the target."""
    (folder / name).write_bytes(content)
    field(folder, target=f"{{path: {name}, held_out: 4}}")


def compressed(folder: Path) -> None:
    text("rows.jsonl.gz", gzip.compress((folder / "rows.jsonl").read_bytes()), folder)


def array(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    text("rows.json", "\ufeff".encode() + json.dumps(rows, indent=1).replace("\n", "\r\n").encode(), folder)


def table(delimiter: str, encoding: str, folder: Path) -> None:
    lines = [delimiter.join(("prompt", "response")), *(delimiter.join((word, f"{word[::-1]}é")) for word in words())]
    text("rows.csv", "\n".join(lines).encode(encoding), folder)


def benchmark(folder: Path, documents: list[dict[str, Any]] | None = None, **fields: Any) -> None:
    """Score a benchmark of one's own, with fields of its YAML changed."""
    own = folder / "bench"
    own.mkdir(exist_ok=True)
    good = [{"question": f"{i} plus {i}", "choices": [str(2 * i), "x"], "answer": 0} for i in range(1, 9)]
    (own / "sums.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents or good))
    (own / "sums.yaml").write_text(json.dumps(BENCHMARK | fields))
    field(folder, evaluate="{benchmarks: [{name: sums, folder: ./bench}]}")


def nothing(folder: Path) -> None:
    """Change nothing: what is wrong is around the run."""


def moved(name: str, folder: Path) -> None:
    """Make the data folder one of an awkward name."""
    (folder / name).mkdir()


def no_head(folder: Path) -> None:
    tensors(partial(without, "lm_head.weight"), folder)


def prefixed(prefix: str, folder: Path) -> None:
    tensors(lambda weights: {f"{prefix}{name}": value for name, value in weights.items()}, folder)


def missing_target(folder: Path) -> None:
    documents = [{"question": "1 plus 1", "choices": ["2", "3"], "answer": 0}, {"question": "2", "choices": ["4", "5"]}]
    benchmark(folder, documents)


def no_model(folder: Path) -> None:
    shutil.rmtree(folder / "model")


CALL = [{"type": "function", "function": {"name": "look_up", "arguments": {"word": "a"}}}]
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
INPUTS: dict[str, list[Input]] = {
    "Models": [
        Input("a folder that is not there", no_model, "is not a folder"),
        Input("weights without `lm_head.weight`, untied", no_head, "lacks lm_head.weight"),
        Input(
            "weights of a compiled model, `_orig_mod.` before each name", partial(prefixed, "_orig_mod."),
            "save the inner model",
        ),
        Input("an index that names a file that is not there", shard, "which the folder does not hold"),
        Input("a weights file that was cut short", cut, "was cut short"),
        Input("a Git LFS pointer in place of the weights", pointer, "LFS"),
        Input("weights in a pickle file alone", pickled, "pickle files are never read"),
        Input("a LoRA adapter as `base`", adapter, "holds an adapter"),
        Input(
            "4-bit weights", partial(model_field, "config.json", quantization_config={"quant_method": "bitsandbytes"}),
            "quantised weights",
        ),
        Input("an encoder with a decoder (T5)", partial(other_kind, "T5"), "encoder with a decoder"),
        Input("a model that reads the whole text (BERT)", partial(other_kind, "Bert"), "not causal"),
        Input("a recurrent model whose states we cannot keep apart (RWKV)", partial(other_kind, "Rwkv"), "rwkv"),
        Input("a tokenizer with more tokens than the embedding has rows", more_tokens, "'<|added|>'"),
        Input(
            "an end token out of range", partial(model_field, "generation_config.json", eos_token_id=50256),
            "eos_token_id 50256",
        ),
        Input(
            "an end token that is an ordinary character",
            partial(model_field, "generation_config.json", eos_token_id=40), "ordinary token",
        ),
    ],
    "Data": [
        Input(
            "a system message, and a chat template that refuses it",
            lambda folder: (
                save(folder / "model", NO_SYSTEM + CHAT),
                chats(lambda word: {"messages": turns(word, first={"role": "system", "content": "Be brief."})}, folder),
            )[-1],
            "system role is not supported",
        ),
        Input(
            "null in a column that a template names",
            lambda folder: (
                pairs(lambda word: {"question": word, "input": None, "answer": word[::-1]}, folder),
                field(folder, target="{path: rows.jsonl, prompt: '{question}{input}=', response: answer, held_out: 4}"),
            )[-1],
        ),
        Input(
            "prompt and completion as lists of messages",
            lambda folder: (
                pairs(lambda word: {"prompt": turns(word)[:1], "completion": turns(word)[1:]}, folder),
                field(folder, target="{path: rows.jsonl, prompt: prompt, response: completion, held_out: 4}"),
            )[-1],
            said="the chat template writes them",
        ),
        Input(
            "ShareGPT's `conversations`",
            partial(
                pairs,
                lambda word: {
                    "conversations": [{"from": "human", "value": word}, {"from": "gpt", "value": word[::-1]}]
                },
            ),
            said="is taken as chats",
        ),
        Input("a list in a column of texts", partial(pairs, lambda word: {"prompt": word, "response": [word]}), "list"),
        Input(
            "true or false in a column of texts", partial(pairs, lambda word: {"prompt": word, "response": True}),
            "a truth value",
        ),
        Input(
            "half an emoji", partial(pairs, lambda word: {"prompt": word, "response": f"{word}\ud83d"}),
            said="half of a",
        ),
        Input(
            "an assistant turn with `weight: 0`",
            partial(chats, lambda word: {"messages": [*turns(word, weight=0), *turns(f"{word}!")]}),
        ),
        Input(
            "`tools` beside messages, and a template that has no place for them",
            partial(chats, lambda word: {"messages": turns(word), "tools": TOOLS}), "tools",
        ),
        Input(
            "tool calls without content, and a template that has no place for them",
            partial(chats, lambda word: {"messages": turns(word, content=None, tool_calls=CALL)}), "tool_calls",
        ),
        Input(
            "a column that no row has", partial(field, target="{path: rows.jsonl, prompt: question, held_out: 4}"),
            "no column for 'question'",
        ),
        Input("a line that is no JSON", partial(text, "rows.jsonl", b'{"prompt": "a", "response": \n'), "line 1"),
        Input("a JSON array with a byte order mark and CRLF", array),
        Input("a compressed file, `.jsonl.gz`", compressed),
        Input("a CSV file of semicolons", partial(table, ";", "utf-8"), ";"),
        Input("a CSV file in Latin-1", partial(table, ",", "latin-1"), "UTF-8"),
        Input("an Excel file", partial(text, "rows.xlsx", b"PK\x03\x04"), ".xlsx"),
        Input(
            "preference rows (chosen, rejected)",
            partial(pairs, lambda word: {"prompt": word, "chosen": word[::-1], "rejected": word}), "chosen",
        ),
    ],
    "Benchmarks": [
        Input("a few-shot split that the data lack", partial(benchmark, fewshot_split="dev", num_fewshot=2), "dev"),
        Input("a document without its target", missing_target, "answer"),
        Input("a text that names a field that no document has", partial(benchmark, doc_to_text="{{query}} ="), "query"),
        Input(
            "a metric that lm-eval lacks", partial(benchmark, metric_list=[{"metric": "accuracy_of_mine"}]),
            "accuracy_of_mine",
        ),
    ],
    "Environment": [
        Input(
            "a proxy for everything", nothing,
            environment={"HTTP_PROXY": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"},
        ),
        Input(
            "a Prefect server that is away", nothing, "PREFECT_API_URL",
            environment={"PREFECT_API_URL": "http://127.0.0.1:9/api"},
        ),
        Input(
            "a data folder named `50% #1?x ü`", partial(moved, "50% #1?x ü"),
            environment={"CFSD_HOME": "{folder}/50% #1?x ü"},
        ),
        Input("a data folder that is a file", lambda folder: (folder / "data").write_text("x") and None, "data"),
    ],
}  # fmt: skip
