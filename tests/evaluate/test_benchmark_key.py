"""What a score depends on is in the benchmark's key, and nothing else is."""

import gc
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cfsd.errors import BadInput
from cfsd.evaluate import benchmark_code, benchmark_files
from cfsd.evaluate.benchmark import Benchmark
from cfsd.evaluate.benchmark_files import BUNDLED, names_in
from cfsd.evaluate.harness.load import loaded
from tests.evaluate.test_score import CHOICE, write

READS = """
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import {module}

WORDS = json.loads((Path(__file__).parent / "lists" / "words.json").read_text())


def prepared(documents):
    return documents.map(lambda doc: {{"question": WORDS[0] + doc["question"] + {module}.END}})
"""


@pytest.fixture(autouse=True)
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remembered digests are kept away from the working directory."""
    monkeypatch.setenv("CFSD_HOME", str(tmp_path / "home"))


def python(folder: Path, module: str = "ends") -> Benchmark:
    """Write a benchmark whose module imports one beside it and reads a list; return it."""
    path = write(folder, CHOICE)
    path.write_text(path.read_text() + "process_docs: !function tools.prepared\n")
    (folder / "tools.py").write_text(READS.format(module=module))
    (folder / f"{module}.py").write_text("END = '?'\n")
    (folder / "lists").mkdir()
    (folder / "lists" / "words.json").write_text('["a "]')
    return Benchmark(name="pick", folder=str(folder))


def append(path: Path, text: str = " ") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(text)


def questions(benchmark: Benchmark) -> list[str]:
    with loaded(benchmark, torch.device("cpu")) as (task, _):
        return [document["question"] for document in task.eval_docs]


@pytest.mark.parametrize("name", ["tools.py", "ends.py", "lists/words.json", "new.csv", "deep/er/list.yaml", "a.bak"])
def test_every_file_beside_python_counts(tmp_path: Path, name: str) -> None:
    mine = python(tmp_path / "bench")
    before = mine.digest()
    append(tmp_path / "bench" / name)
    assert mine.digest() != before


@pytest.mark.parametrize(
    "name", ["__pycache__/tools.pyc", ".git/HEAD", ".tools.py.swp", "tools.py~", "#tools.py#", "lists/.DS_Store"]
)
def test_what_is_no_content_does_not_count(tmp_path: Path, name: str) -> None:
    mine = python(tmp_path / "bench")
    before = mine.digest()
    append(tmp_path / "bench" / name)
    assert mine.digest() == before


def test_a_file_that_moves_counts_and_a_folder_that_moves_does_not(tmp_path: Path) -> None:
    mine = python(tmp_path / "bench")
    shutil.copytree(tmp_path / "bench", tmp_path / "there")
    there = Benchmark(name="pick", folder=str(tmp_path / "there"))
    assert there.digest() == mine.digest()
    (tmp_path / "there" / "lists" / "words.json").rename(tmp_path / "there" / "words.json")
    assert there.digest() != mine.digest()


def test_linked_files_and_folders_count_by_content(tmp_path: Path) -> None:
    mine = python(tmp_path / "bench")
    append(tmp_path / "shared" / "names.txt", "one")
    (tmp_path / "bench" / "linked").symlink_to(tmp_path / "shared")
    (tmp_path / "bench" / "circle").symlink_to(tmp_path / "bench")
    before = mine.digest()
    append(tmp_path / "shared" / "names.txt", "two")
    assert mine.digest() != before


def test_modules_from_elsewhere_count_unless_they_are_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = python(tmp_path / "bench")
    append(tmp_path / "lib" / "scoring_rules" / "__init__.py", "import scoring_words\n")
    append(tmp_path / "lib" / "scoring_rules" / "table.json", "{}")
    append(tmp_path / "lib" / "scoring_words.py", "WORDS = []\n")
    append(tmp_path / "lib" / "unrelated.py", "x = 1\n")
    append(tmp_path / "bench" / "tools.py", "import scoring_rules, numpy, cfsd\n")
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    seen = {mine.digest()}
    for name in ("scoring_rules/__init__.py", "scoring_rules/table.json", "scoring_words.py"):
        append(tmp_path / "lib" / name, "\n")
        seen.add(mine.digest())
    append(tmp_path / "lib" / "unrelated.py", "y = 1\n")
    assert mine.digest() in seen and len(seen) == 4


def test_what_a_module_imports_and_reads_is_read_anew_in_one_process(tmp_path: Path) -> None:
    mine = python(tmp_path / "bench")
    first, path = questions(mine), list(sys.path)
    (tmp_path / "bench" / "lists" / "words.json").write_text('["b "]')
    (tmp_path / "bench" / "ends.py").write_text("END = '??'\n")
    second = questions(mine)
    assert first[2] == "a cab?" and second[2] == "b cab??"
    assert sys.path == path and "ends" not in sys.modules


def test_two_benchmarks_may_each_have_a_module_of_the_same_name(tmp_path: Path) -> None:
    one, two = python(tmp_path / "one"), python(tmp_path / "two")
    (tmp_path / "two" / "ends.py").write_text("END = '!'\n")
    assert questions(one)[2] == "a cab?" and questions(two)[2] == "a cab!"


PLACES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "a glob": lambda folder: {"dataset_kwargs": {"data_files": {"test": "data/*.jsonl"}}},
    "lists by split": lambda folder: {"dataset_kwargs": {"data_files": {"test": ["data/rows.jsonl"]}}},
    "an absolute path": lambda folder: {"dataset_kwargs": {"data_files": {"test": str(folder / "data/rows.jsonl")}}},
    "a file URL": lambda folder: {"dataset_kwargs": {"data_files": {"test": f"file://{folder}/data/rows.jsonl"}}},
    "home": lambda folder: {"dataset_kwargs": {"data_files": {"test": "~/data/rows.jsonl"}}},
    "a folder of data": lambda folder: {"dataset_path": "./data", "dataset_kwargs": None, "test_split": "train"},
    "its bare name": lambda folder: {"dataset_path": "data", "dataset_kwargs": None, "test_split": "train"},
    "data_dir": lambda folder: {"dataset_kwargs": {"data_dir": "data"}, "test_split": "train"},
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
def test_data_counts_and_is_read_however_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Callable[[Path], dict[str, Any]]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "bench"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "bench", CHOICE, **place(tmp_path / "bench"))
    mine = Benchmark(name="pick", folder=str(tmp_path / "bench"))
    before = mine.digest()
    assert len(questions(mine)) == 8
    append(tmp_path / "bench" / "data" / "rows.jsonl", json.dumps({"question": "x", "choices": ["a"], "right": 0}))
    assert mine.digest() != before and len(questions(mine)) == 9


def test_without_python_only_yaml_includes_and_data_count(tmp_path: Path) -> None:
    write(tmp_path / "bench", CHOICE, include="../common/base.yaml")
    append(tmp_path / "common" / "base.yaml", "include: more.yaml\n")
    append(tmp_path / "common" / "more.yaml", "description: 'Say it: '\n")
    mine = Benchmark(name="pick", folder=str(tmp_path / "bench"))
    before = mine.digest()
    append(tmp_path / "bench" / "README.md", "words")
    write(tmp_path / "bench", CHOICE, task="another")
    assert mine.digest() == before
    append(tmp_path / "common" / "more.yaml", "# end\n")
    assert mine.digest() != before


def test_a_new_benchmark_leaves_the_keys_of_the_bundled_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(BUNDLED, tmp_path / "bundled")
    before = {name: Benchmark(name=name).digest() for name in names_in(BUNDLED)}
    write(tmp_path / "bundled", CHOICE)
    monkeypatch.setattr(benchmark_files, "BUNDLED", tmp_path / "bundled")
    monkeypatch.setattr("cfsd.evaluate.benchmark.BUNDLED", tmp_path / "bundled")
    assert {name: Benchmark(name=name).digest() for name in before} == before


def test_a_folder_that_cannot_be_a_benchmarks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = python(tmp_path / "bench")
    monkeypatch.setattr(benchmark_code, "MAX_FILES", 4)
    with pytest.raises(BadInput, match=r"bench: its Python may read any .* a folder of their own"):
        mine.digest()


def test_the_data_folder_of_runs_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = python(tmp_path / "bench")
    monkeypatch.setenv("CFSD_HOME", str(tmp_path / "bench" / "data folder"))
    before = mine.digest()
    append(tmp_path / "bench" / "data folder" / "store" / "artifact.json")
    assert mine.digest() == before


def test_a_large_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = python(tmp_path / "bench")
    append(tmp_path / "bench" / "large.txt", "x" * benchmark_code.REMEMBERED)
    before = mine.digest()

    def refuse(path: Path) -> str:
        raise AssertionError(f"{path} is read again")

    monkeypatch.setattr("cfsd.store.digests.sha256_of_file", refuse)
    assert mine.digest() == before


def test_threads_that_parse_at_the_same_time_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Python before 3.11.8 raises SystemError where a collection of garbage lets another thread parse, too."""
    mine, found = python(tmp_path / "bench"), list[str]()
    append(tmp_path / "bench" / "long.py", "".join(f"x{i} = [{i}, ({i}, {{{i}: {i}}})]\n" for i in range(300)))

    def switch(*_: object) -> None:
        time.sleep(1e-5)

    def digests() -> None:
        found.extend(mine.digest() for _ in range(10))

    threads, before = [threading.Thread(target=digests) for _ in range(4)], gc.get_threshold()
    gc.callbacks.append(switch)
    gc.set_threshold(5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(switch)
    assert found == [mine.digest()] * 40


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    mine = python(tmp_path / "bench")
    (tmp_path / "bench" / "lists" / "words.json").chmod(0)
    with pytest.raises(BadInput, match=r"words\.json cannot be read"):
        mine.digest()
