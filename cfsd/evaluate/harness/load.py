"""Loading one benchmark as lm-eval's task object, quietly and without disturbing a training under way."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import lm_eval.api.task
import lm_eval.utils
import torch
from datasets.exceptions import DatasetsError
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from cfsd.errors import BadInput
from cfsd.evaluate.benchmark import Benchmark
from cfsd.evaluate.benchmark_files import Definition, is_hub
from cfsd.evaluate.harness.data_mistakes import mistake_in
from cfsd.evaluate.harness.document_rules import Absent, Unusable
from cfsd.evaluate.harness.own_code import in_words, own_rules
from cfsd.evaluate.harness.reads import CACHE
from cfsd.model.undisturbed import seeded

EMPTY = "fill it in (in CSV, an empty cell and words such as NA and null are read as missing)"
SPLITS = ("test_split", "validation_split", "training_split", "fewshot_split")


class Unreachable(BadInput, ConnectionError):
    """The hub did not answer; trying again may help."""


@contextmanager
def loaded(benchmark: Benchmark, device: torch.device) -> Iterator[tuple[Any, list[str]]]:
    """Yield lm-eval's task object, and the growing list of lm-eval's distinct warnings.

    Inside, random numbers are seeded as lm-eval seeds them and bars are off; both are as before afterwards.

    Raises: BadInput if the benchmark cannot be loaded.
    """
    benchmark.check()
    # datasets leaves its Arrow files in the user's cache unless another folder is named.
    cache = TemporaryDirectory(prefix=CACHE)
    rules = own_rules(benchmark.find())
    with _quiet() as warnings, seeded(device, DEFAULT_RANDOM_SEED, DEFAULT_OTHER_SEED), cache as folder, rules:
        yield _task(benchmark, folder), warnings


def _task(benchmark: Benchmark, cache: str) -> Any:
    """Return the task object; local data is read into `cache` and needs no network."""
    definition = benchmark.find()
    task = _load(benchmark, definition, cache)
    task.set_config("num_fewshot", task.get_config("num_fewshot") or 0)
    task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    benchmark.check_answers(task.OUTPUT_TYPE)
    if benchmark.max_gen_toks is not None:
        task.set_config("generation_kwargs", {"max_gen_toks": benchmark.max_gen_toks}, update=True)
    _check_fewshot(benchmark, task)
    return task


def _load(benchmark: Benchmark, definition: Definition, cache: str) -> Any:
    folder = None if definition.is_inline() else str(definition.path.parent)
    changed = _changes(benchmark, definition, cache)
    # An inline group is lm-eval's public way to load a YAML file with changed settings.
    spec = changed if definition.is_inline() else {"group": "cfsd", "task": [{"task": benchmark.name} | changed]}
    try:
        # Reading one folder takes milliseconds, lm-eval's own 14,000 files 6-23 s.
        return TaskManager(include_path=folder, include_defaults=False).load([spec])["tasks"][benchmark.name]
    except BadInput as error:
        raise BadInput(f"benchmark {benchmark.name}, {definition.place()}: {error}") from error
    except ConnectionError as error:
        raise Unreachable(
            f"benchmark {benchmark.name}: its data is on the hub, which could not be reached ({error}); connect to "
            "the network, or give a benchmark with local data: `folder` with your YAML, or a bundled one"
        ) from error
    except MemoryError:
        raise
    except (Exception, SystemExit) as error:  # the user's YAML, data and Python: whatever they raise
        raise BadInput(_not_loaded(benchmark, definition, error)) from error


def _not_loaded(benchmark: Benchmark, definition: Definition, error: BaseException) -> str:
    if isinstance(error, Unusable):  # lm-eval looks at the first document
        return f"benchmark {benchmark.name}, document 0: {error}"
    if isinstance(error, Absent):
        return f"benchmark {benchmark.name}, document 0: a template prints a field that it has not ({error}); {EMPTY}"
    said = in_words(error, definition)
    if isinstance(error, IndexError) and said.startswith("IndexError"):  # not in Python of its own
        said = "the doc_to_target of document 0 is not the number of one of its choices"
    if isinstance(error, DatasetsError):
        said = mistake_in(definition) or said
    if isinstance(error, KeyError) and error.args[0] in [definition.config.get(key) for key in SPLITS]:
        named = next(key for key in SPLITS if definition.config.get(key) == error.args[0])
        said = f"{named} is {error.args[0]!r}, which its data lack"
    return (
        f"benchmark {benchmark.name}: lm-eval cannot load {definition.place(full=True)} ({said}); "
        "correct that file or its data"
    )


def _changes(benchmark: Benchmark, definition: Definition, cache: str) -> dict[str, Any]:
    config = definition.config
    places = [key for key in ("dataset_path", "dataset_kwargs") if config.get(key)]
    changes = copy.deepcopy(config if definition.is_inline() else {key: config[key] for key in places})
    if not is_hub(definition) and definition.data and "custom_dataset" not in config:
        changes["dataset_kwargs"] = {**(changes.get("dataset_kwargs") or {}), "cache_dir": cache}
    if benchmark.num_fewshot is not None:
        changes["num_fewshot"] = benchmark.num_fewshot
    return changes


def _check_fewshot(benchmark: Benchmark, task: Any) -> None:
    examples, sampler = task.get_config("num_fewshot"), getattr(task, "sampler", None)
    if not examples or sampler is None:
        return
    needed = examples + int(task.fewshot_cfg.split == task.config.test_split)  # not the document itself
    if len(sampler.fewshot_docs()) < needed:
        raise BadInput(
            f"benchmark {benchmark.name}: num_fewshot {examples} needs {needed} documents to choose from, "
            f"and there are {len(sampler.fewshot_docs())}; lower num_fewshot"
        )


class _Collector(logging.Handler):
    """Keeps distinct warnings, except lm-eval's own about every model that was loaded before."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        is_expected = record.module == "huggingface" and record.funcName == "__init__"
        if not is_expected and message not in self.messages:
            self.messages.append(message)


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """Keep lm-eval and datasets from writing; yield the growing list of lm-eval's distinct warnings."""
    logger, collector = logging.getLogger("lm_eval"), _Collector()
    lm_eval.utils.warning_once.cache_clear()  # what was said of another benchmark, or in a check, holds here too
    propagate, bars = logger.propagate, not datasets.are_progress_bars_disabled()
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what it logs of broken data is in its error too
    logger.propagate = False
    logger.addHandler(collector)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = partial(tqdm, disable=True)  # the one bar that has no switch
    try:
        yield collector.messages
    finally:
        lm_eval.api.task.tqdm = tqdm
        datasets.logging.set_verbosity(verbosity)
        logger.removeHandler(collector)
        logger.propagate = propagate
        if bars:
            datasets.enable_progress_bars()
