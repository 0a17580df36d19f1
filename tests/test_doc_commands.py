"""Commands of the pages, run as they stand and in their order, in a folder with the files that the pages speak of.

A command that is not run here is named with the reason, so that none is left out unseen.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cfsd.model.tiny import new_tokenizer
from tests.conftest import ROOT
from tests.test_docs import PAGES, blocks

COMMAND = re.compile(r"^(?:[A-Z_]+=\S+ )*(?:python -m|make|pip|docker|kubectl|export|source \S+activate)\b")
ELSEWHERE = {  # the beginning of a command -> why it is not run here
    "make ": "targets of the Makefile are what CI runs",
    "source ": "what runs here has it",
    "pip ": "installs from a package index",
    "docker ": "needs docker: tests/test_deployments.py reads the files",
    "kubectl ": "needs a cluster: tests/test_deployments.py reads the files",
    "export ": "names servers of an example",
    "python -m flows.serve worker": "works until it is stopped: tests/flows/test_queue.py",
    "python -m benchmarks.": "benchmarks and studies: tests/benchmarks",
    "python -m flows.mitigate mine.yaml --machine engine=server": "needs a server: tests/generate/test_shards.py",
    "python -m flows.mitigate mine.yaml --until filter --machine engine=server": "the same",
    "python -m flows.mitigate mine.yaml --machine cluster=auto": "needs Ray: tests/tasks/test_cluster.py",
    "python -m flows.mitigate mine.yaml --until filter --machine cluster=auto": "the same",
    "python -m flows.mitigate recipe.yaml --store s3:": "tests/store/test_shared_store_flow.py",
    "python -m flows.mitigate mine.yaml --machine micro_batch_tokens=16384": "tests/train/test_two_processes_exact.py",
    "python -m flows.mitigate mine.yaml --machine training_processes=8": "the same",
    "python -m flows.compare mine-compared.yaml --seeds 5 --machine devices=8": "8 devices: see test_parallel",
    "python -m flows.compare deployments/recipes/demo.yaml": "half an hour; `make demo` runs one seed",
    "python -m flows.measure base@": "needs two servers: tests/flows/test_measure_served.py",
    "python -m flows.measure --samples logs": "needs logs of lm-eval: tests/flows/test_measure_logs.py",
    "python -m flows.approve": "needs a model that is registered: tests/tasks/test_registry.py",
    "python -m flows.continual deployments/recipes/tiny-sequence.yaml --earlier rows --seeds 5": "15 trainings",
    "python -m flows.regress mine.yaml --baseline champion": "needs an approved model: tests/tasks/test_registry.py",
}  # fmt: skip


def commands(page: Path) -> list[str]:
    """Return the commands of a page's blocks that have no language, without comments and continued lines joined."""
    lines = [line for block in blocks(page, "") for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    plain = [re.sub(r"\s+#.*", "", line).strip() for line in lines]
    return [line for line in plain if COMMAND.match(line)]


def reason(command: str) -> str | None:
    """Return why a command is not run here."""
    return next((why for beginning, why in ELSEWHERE.items() if command.startswith(beginning)), None)


ROWS = "{path: ./rows.jsonl, prompt: '{question}', response: ' {answer}'}"
FAST = ROOT / "README.md"
RUN = {page: found for page in PAGES if (found := [c for c in commands(page) if not reason(c)])}


MARKED = [
    pytest.param(
        page,
        id=str(page.relative_to(ROOT)),
        marks=[] if page == FAST else [pytest.mark.slow, pytest.mark.timeout(3600)],
    )
    for page in RUN
]


def random_model(place: Path, seed: int) -> None:
    """Write a small random Llama that reads printable characters and attends to enough of them for benchmarks."""
    tokenizer = new_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=1024, **sizes, **ids))
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)


def recipe_of(page: str, named: str) -> str:
    """Return the block of YAML in `page` that has `named` in it."""
    (block,) = (block for block in blocks(ROOT / "docs" / page, "yaml") if named in block)
    return block


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a user: two models, rows, benchmarks, and the recipes as the pages have them."""
    place = tmp_path_factory.mktemp("user")
    shutil.copytree(ROOT / "deployments", place / "deployments")  # a command may write a baseline beside the others
    for name, seed in (("my-model", 0), ("tuned", 1)):
        random_model(place / name, seed)
    rows = [{"question": f"What comes after {n}?", "answer": str(n + 1)} for n in range(160)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    unseen = [{"prompt": row["question"], "response": row["answer"]} for row in rows[:80]]
    (place / "unseen.jsonl").write_text("".join(json.dumps(row) + "\n" for row in unseen))
    (place / "mine.yaml").write_text(recipe_of("tutorial/own-model.md", "name: mine"))
    (place / "recipe.yaml").write_text((place / "mine.yaml").read_text())
    compared = recipe_of("how-to/compare.md", "finetune: {generate.rows: 0}")
    (place / "mine-compared.yaml").write_text(compared.replace("{path: ./rows.jsonl}", ROWS))
    write_benchmarks(place / "my-benchmarks")
    return place


def write_benchmarks(place: Path) -> None:
    place.mkdir()
    documents = [{"text": f"{n} and one is", "answer": f" {n + 1}"} for n in range(20)]
    (place / "items.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (place / "adding.yaml").write_text(
        "task: adding\ndataset_path: json\ndataset_kwargs: {data_files: items.jsonl}\ntest_split: train\n"
        "output_type: loglikelihood\ndoc_to_text: '{{text}}'\ndoc_to_target: '{{answer}}'\n"
        "metric_list: [{metric: acc}]\n"
    )


def test_every_reason_is_needed_and_every_page_has_its_commands_read() -> None:
    found = [command for page in PAGES for command in commands(page)]
    assert {beginning for beginning in ELSEWHERE if not any(c.startswith(beginning) for c in found)} == set()
    named = {name for why in ELSEWHERE.values() for name in re.findall(r"tests/[\w/]+(?:\.py)?", why)}
    assert {name for name in named if not (ROOT / name).exists()} == set()
    assert len(found) > 60


@pytest.mark.parametrize("page", MARKED)
def test_the_commands_of_a_page_run(page: Path, folder: Path, server: str) -> None:
    printed = ""
    for command in RUN[page]:
        words = shlex.split(filled(command, printed, folder))
        result = subprocess.run(
            [sys.executable, *words[1:]], capture_output=True, text=True, cwd=folder, timeout=1800,
            env={**os.environ, "CFSD_HOME": "data", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        allowed = {0, 1, 3} if "flows.regress" in command else {0}  # a verdict is an answer, too
        assert result.returncode in allowed, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}"
        printed += result.stdout


def filled(command: str, printed: str, folder: Path) -> str:
    """Return the command with what the page has in angle brackets, as the commands before it printed it."""
    if "<key>" in command:
        (*_, key) = re.findall(r"store/corpus/([0-9a-f]{16})", printed)
        return command.replace("<key>", key)
    if found := re.search(r"data/reports/(\S+)-<id>", command):
        name = found[1].replace("<name>", "mine")
        variant = command.partition("--variant ")[2]
        reports = [r for r in folder.glob(f"data/reports/{name}-*/summary.json") if f'"{variant}' in r.read_text()]
        report = max(reports, key=lambda summary: summary.stat().st_mtime).parent
        return command.replace(found[0], str(report))
    return command
