"""Benchmark: one lm-eval task to score, checked and digested without importing lm-eval."""

from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, JsonValue, NonNegativeInt, PositiveInt, model_validator

from cfsd.errors import BadInput
from cfsd.evaluate import benchmark_files
from cfsd.evaluate.benchmark_code import digest_of_code, sha256
from cfsd.evaluate.benchmark_files import BUNDLED, Definition, is_hub
from cfsd.evaluate.benchmark_settings import check_settings, length_limit
from cfsd.spec import Spec, digest_of

ROLLING = "loglikelihood_rolling"  # a long text is read in windows, and what a window begins with is less likely
WRITTEN = "generate_until"  # the output type whose answers the model writes; lm-eval's default
OUTPUT_TYPES = ("loglikelihood", ROLLING, "multiple_choice", WRITTEN)


class Benchmark(Spec):
    """What to score. In YAML a plain string is the name."""

    neutral: ClassVar[dict[str, Any]] = {
        "task": None, "chat_template": False, "thinking_end": None, "max_gen_toks": None, "filter": None
    }  # fmt: skip

    name: str = Field(description="an lm-eval task: a bundled one, one of lm-eval's own, or one of `folder`")
    folder: str | None = Field(None, description="with lm-eval YAML files; empty: bundled, then lm-eval's own")
    task: dict[str, JsonValue] | None = Field(
        None, description="an lm-eval task in full instead of a file: the same fields; `name` is its `task`"
    )
    limit: PositiveInt | None = Field(None, description="score the first N documents only")
    num_fewshot: NonNegativeInt | None = Field(None, description="examples in the prompt; empty: as in its YAML")
    metric: str | None = Field(None, description="empty: acc, else exact_match, else the first listed")
    filter: str | None = Field(None, description="which of several reads the answers; empty: the first")
    chance: float | None = Field(None, ge=0, lt=1, description="score of guessing; empty: from the choices")
    chat_template: bool = Field(
        False, description="put prompts and examples into the model's chat template; a YAML's metadata may say so too"
    )
    thinking_end: str | None = Field(
        None, min_length=1, description="where reasoning ends, as `</think>`: the answer is what follows the last one"
    )
    max_gen_toks: PositiveInt | None = Field(
        None, description="most tokens of a written answer, reasoning included; empty: as in its YAML"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        if isinstance(value, dict) and "name" not in value and isinstance(value.get("task"), dict):
            return {"name": value["task"].get("task"), **value}
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_definition(self) -> Self:
        if self.task is None:
            return self
        if self.folder is not None:
            raise ValueError(f"benchmark {self.name!r} has both `folder` and `task`; leave one out")
        if self.task.get("task") != self.name:
            raise ValueError(f"benchmark {self.name!r} has a `task` named {self.task.get('task')!r}; name it once")
        if "include" in self.task:
            raise ValueError(f"benchmark {self.name!r}: `include` works in YAML files only; write its settings out")
        return self

    def digest(self) -> str:
        """Return 16 hex digits over settings and content (YAML, includes, local data), never paths of data.

        With `!function` in the YAML, every file of its folder counts too, and imported modules that are not installed.
        lm-eval's own benchmarks count by name and installed version; their data is on the hub.

        Raises: BadInput as `check` does.
        """
        settings = self._identity()
        settings.pop("folder")
        definition = self.find()
        if is_hub(definition):
            content: Any = version("lm_eval")
        else:
            _check_data(self.name, definition)
            content = [sha256(path) for path in (*definition.sources, *definition.data)]
            content += [digest_of_code(code) for code in definition.code]
        if self.task is not None:
            settings["task"] = benchmark_files.placeless(self.task)
        return digest_of([type(self).__name__, self.version, settings, content])

    def check(self) -> None:
        """Look for errors that are detectable without importing lm-eval, in a second.

        Raises: BadInput for an unknown name, a missing folder, broken YAML, missing or empty data, a group,
            settings of a wrong type, splits that the data lack, an output type that lm-eval lacks, or a benchmark
            that runs code written by the model.
        """
        definition = self.find()
        if definition.config.get("unsafe_code"):
            raise BadInput(f"benchmark {self.name} runs code that the model writes; cfsd never does: leave it out")
        kind = definition.config.get("output_type", WRITTEN)
        if "class" not in definition.config:  # lm-eval checks its own tasks in Python
            if kind not in OUTPUT_TYPES:
                raise BadInput(
                    f"benchmark {self.name}: output_type {kind!r} in {definition.place()} is none of "
                    f"{', '.join(OUTPUT_TYPES)}; correct it"
                )
            self.check_answers(str(kind))
            if self.thinking_end is not None and definition.config.get("gen_prefix"):
                raise BadInput(
                    f"benchmark {self.name} begins the answer itself (gen_prefix), so that no reasoning comes before "
                    "it: leave thinking_end out"
                )
        _check_data(self.name, definition)
        if not is_hub(definition):
            check_settings(self.name, definition)

    def is_hub(self) -> bool:
        """Return whether it comes with lm-eval, so that its data is on the hub."""
        return is_hub(self.find())

    def needs_check(self) -> bool:
        """Return whether its documents can hold a mistake: a bundled one, as it stands, is known to be whole."""
        as_it_stands = Benchmark(name=self.name, limit=self.limit, chance=self.chance)
        return self != as_it_stands or not self.find().path.is_relative_to(BUNDLED)

    def check_answers(self, kind: str) -> None:
        """Raise BadInput if a setting for written answers is set and the output type `kind` has none."""
        for name in ("thinking_end", "max_gen_toks"):
            if getattr(self, name) is not None and kind != WRITTEN:
                raise BadInput(
                    f"benchmark {self.name}: {name} is for answers that the model writes ({WRITTEN}); "
                    f"this one is a {kind}: leave it out"
                )

    def check_context(self, context: int) -> None:
        """Raise BadInput if the answers, as long as its settings allow, have no room in a model's `context`."""
        if self.is_written():
            settings = self.find().config.get("generation_kwargs") or {}
            self.check_room(self.max_gen_toks or length_limit(settings), context)

    def is_written(self) -> bool:
        """Return whether the model writes the answers, as far as the YAML says it."""
        config = self.find().config
        return config.get("output_type", WRITTEN) == WRITTEN and "class" not in config

    def check_room(self, limit: int, context: int) -> None:
        """Raise BadInput if answers of `limit` tokens leave no room for a prompt in a model's `context`."""
        if limit >= context:
            raise BadInput(
                f"benchmark {self.name}: answers of {limit} tokens leave no room for a prompt in the model's "
                f"context of {context}; set its max_gen_toks lower"
            )

    def is_chat(self) -> bool:
        """Return whether prompts go into the model's chat template, as set here or in the metadata of its YAML."""
        return self.chat_template or bool(self._metadata().get("chat_template"))

    def reads_whole_texts(self) -> bool:
        """Return whether each document is one text, of which every token is predicted in windows of the context."""
        return self.find().config.get("output_type") == ROLLING

    def limit_is_meant(self) -> bool:
        """Return whether an answer that is cut off at the YAML's own limit is no reason to doubt its score."""
        return bool(self._metadata().get("limit_is_meant")) and self.max_gen_toks is None

    def completion(self) -> str | None:
        """Return the name of its form for models without a chat template, None where it has none."""
        found = self._metadata().get("completion")
        return found if isinstance(found, str) else None

    def lacks_template(self) -> BadInput:
        """Return the error of a model without a chat template where one is needed."""
        other = self.completion()
        remedy = f"take {other}, its form for models without one" if other else "turn it off"
        return BadInput(
            f"benchmark {self.name}: chat_template is on, but the model's tokenizer has no chat template; {remedy}, or "
            "measure a model that has one"
        )

    def _metadata(self) -> dict[str, Any]:
        metadata = self.find().config.get("metadata")
        return metadata if isinstance(metadata, dict) else {}

    def find(self) -> Definition:
        """Return the definition of this benchmark.

        Raises: BadInput if there is none.
        """
        if self.task is not None:
            return benchmark_files.inline(self.task)
        if self.folder is not None:
            return self._find_in(Path(self.folder).expanduser())
        if definition := benchmark_files.find(self.name, BUNDLED) or benchmark_files.find_hub(self.name):
            return definition
        raise BadInput(
            f"no benchmark {self.name!r}: bundled are {_listed(BUNDLED)}; `lm-eval ls tasks` lists lm-eval's own; "
            "for one of yours set `folder` to the folder of its YAML file"
        )

    def _find_in(self, folder: Path) -> Definition:
        if not folder.is_dir():
            raise BadInput(f"benchmark {self.name}: no folder {folder}; correct `folder` or leave it out")
        if definition := benchmark_files.find(self.name, folder):
            return definition
        raise BadInput(f"no benchmark {self.name!r} in {folder}, only {_listed(folder)}; correct `name` or `folder`")


def _listed(folder: Path) -> str:
    return ", ".join(benchmark_files.names_in(folder)) or "none"


def _check_data(name: str, definition: Definition) -> None:
    start = "the working directory" if definition.is_inline() else "the folder it is in"
    for path in definition.data:
        if not path.is_file():
            raise BadInput(f"benchmark {name}: no data file {path}; paths in {definition.place()} start from {start}")
        with path.open("rb") as file:
            if not file.read(4096).strip():
                raise BadInput(f"benchmark {name}: data file {path} is empty; it needs one document per line")
