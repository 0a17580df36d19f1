"""The logs in a folder that lm-eval wrote, one per benchmark, and under which conditions they were made."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator

from cfsd.errors import BadInput
from cfsd.evaluate.benchmark import ROLLING, Benchmark
from cfsd.spec import Spec
from cfsd.store.digests import sha256_of_file

DATED = re.compile(r"(?P<name>.+)_(?P<date>\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(\.\d+)?)")  # results_DATE, samples_NAME_DATE
ADDRESS = re.compile(r" at 0x[0-9a-f]+")
SAMPLES = "samples_"
ARGUMENTS = (  # of lm-eval's model: they decide what it is asked, or what of its answer counts
    "add_bos_token", "prefix_token_id", "think_end_token", "enable_thinking", "chat_template_args",
)  # fmt: skip
SHORTER = {"local-completions": 1, "openai-completions": 1, "vllm": 2}  # windows than the max_length that they log
RERUN = "run lm-eval again with --output_path and --log_samples"


class Conditions(BaseModel):
    """How a benchmark was measured: what must be the same of two models, each field as lm-eval wrote it."""

    model_config = ConfigDict(frozen=True)

    version: str | None = Field(None, description="version of the task")
    num_fewshot: int | None = Field(None, description="examples in the prompt (num_fewshot)")
    output_type: str = Field("generate_until", description="output_type")
    repeats: int = Field(1, description="repeats")
    generation_kwargs: dict[str, JsonValue] = Field({}, description="generation_kwargs")
    filter_list: list[dict[str, JsonValue]] = Field([], description="filter_list")
    chat_template: str | None = Field(None, description="chat template (chat_template_sha)")
    system_instruction: str | None = Field(None, description="system instruction (system_instruction_sha)")
    fewshot_as_multiturn: bool = Field(False, description="fewshot_as_multiturn")
    window: int | None = Field(None, description="window in tokens (by max_length)")  # of whole texts alone

    @field_validator("version", mode="before")
    @classmethod
    def _as_number(cls, value: Any) -> str | None:  # 1, 1.0 and "1.0", by lm-eval's version
        try:
            return f"{float(value):g}"
        except (TypeError, ValueError):
            return None if value is None else str(value)

    @field_validator("filter_list", mode="before")
    @classmethod
    def _placeless(cls, value: Any) -> Any:
        """Functions are written with their place in memory, another one in every run."""
        return json.loads(ADDRESS.sub("", json.dumps(value)))

    @field_validator("generation_kwargs", "filter_list", "fewshot_as_multiturn", mode="before")
    @classmethod
    def _none_is_empty(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value

    def filters(self) -> list[str]:
        """Return the names of the filters in their order."""
        return [str(entry["name"]) for entry in self.filter_list] or ["none"]


class Log(Spec):
    """What lm-eval wrote of one model on one benchmark. Its content counts, not its place.

    `reported`: lm-eval's own scores by `metric,filter`, as texts, since one may be NaN. `metric`, `chance`: the user's
    choice, see `Benchmark`.
    """

    name: str
    path: str
    sha256: str
    conditions: Conditions
    reported: dict[str, str]
    higher_is_better: dict[str, bool | None]  # by metric, in the order of the task's YAML
    documents: int | None = None
    known_chance: float | None = None
    lm_eval: str = ""
    arguments: dict[str, JsonValue] = {}  # of lm-eval's model, as far as they may change what it is asked
    metric: str | None = None
    filter: str | None = None
    chance: float | None = None

    neutral: ClassVar[dict[str, Any]] = {"filter": None, "arguments": {}}

    def _identity(self) -> dict[str, Any]:
        return {name: value for name, value in super()._identity().items() if name != "path"}


class LoggedModel(Spec):
    """A model of which there are logs, one per benchmark. `source`: what computed them, such as hf or vllm."""

    name: str
    source: str = ""
    dtype: str = ""
    logs: tuple[Log, ...]
    said: tuple[str, ...] = ()

    def _identity(self) -> dict[str, Any]:
        return {name: value for name, value in super()._identity().items() if name != "said"}

    def names(self) -> list[str]:
        """Return the names of the benchmarks."""
        return [log.name for log in self.logs]

    def log(self, name: str) -> Log:
        """Return the log of a benchmark that there is."""
        return next(log for log in self.logs if log.name == name)

    def versions(self) -> list[str]:
        """Return the versions of lm-eval that wrote the logs, as far as they say."""
        return sorted({log.lm_eval for log in self.logs if log.lm_eval})

    def computed(self) -> str:
        """Return what computed the answers, in words: `hf, bfloat16`."""
        return ", ".join(filter(None, (self.source, self.dtype)))

    def described(self) -> dict[str, JsonValue]:
        """Return what is known of the model, as metadata."""
        known = {"model": self.name, "computed_by": self.computed(), "lm_eval": ", ".join(self.versions())}
        return {name: value for name, value in known.items() if value} | {"benchmarks": len(self.logs)}

    def only(self, chosen: Sequence[Benchmark]) -> Self:
        """Return the logs of the `chosen` benchmarks, with what the user says of them; all for none. Raises BadInput.

        A benchmark that is missing here is not refused, since the other model may lack it as well.
        """
        if not chosen:
            return self
        asked = {benchmark.name: benchmark for benchmark in chosen}
        logs = (log.model_copy(update=_said_by_user(asked[log.name])) for log in self.logs if log.name in asked)
        return self.model_copy(update={"logs": tuple(logs)})


def _said_by_user(benchmark: Benchmark) -> dict[str, Any]:
    given = benchmark.model_dump(exclude_defaults=True, exclude={"name"})
    if decided := sorted(set(given) - {"metric", "filter", "chance"}):
        raise BadInput(
            f"benchmark {benchmark.name}: {', '.join(decided)} cannot be set, since its logs are written; metric, "
            "filter and chance can"
        )
    return given


class _Results(NamedTuple):
    """One results file: a run of lm-eval."""

    path: Path
    date: str
    content: dict[str, Any]

    def benchmarks(self) -> list[str]:
        """Return what it measured, without groups, whose figures are averages of other benchmarks."""
        return [name for name in self.content["configs"] if name in self.content["results"]]

    def model(self) -> str:
        config = self.content.get("config") or {}
        return str(self.content.get("model_name") or config.get("model_args") or "")


def logs_in(folder: Path) -> LoggedModel:
    """Return the newest log of each benchmark in `folder` or below it.

    Raises: BadInput for a folder without logs, of several models, results without samples and samples without results.
    """
    if not folder.is_dir():
        raise BadInput(f"{folder} is not a folder; give one that lm-eval wrote (--output_path)")
    samples = {found: path for path in sorted(folder.rglob(f"{SAMPLES}*.jsonl")) if (found := _dated(path))}
    dates = {(parent, date) for parent, _, date in samples}
    named = [(path, found) for path in sorted(folder.rglob("*.json")) if (found := _dated(path))]
    runs = [_results(path) for path, (parent, name, date) in named if name == "results" or (parent, date) in dates]
    _check_whole(folder, runs, samples)
    newest, said = _newest(folder, runs)
    if not newest:
        raise BadInput(f"{folder}: its results files hold no benchmark; {RERUN}")
    logs = [_log(name, run, samples) for name, run in newest.items()]
    first = next(iter(newest.values())).content
    config = first.get("config") or {}
    return LoggedModel(
        name=_short(runs[0].model(), folder),
        source=_source(first),
        dtype=str(config.get("model_dtype") or "").removeprefix("torch."),
        logs=tuple(sorted(logs, key=lambda log: log.name)),
        said=tuple(said),
    )


def _dated(path: Path) -> tuple[Path, str, str] | None:
    """Return the folder, the name and the date of a file of lm-eval's; None for another file."""
    found = DATED.fullmatch(path.stem)
    return (path.parent, found["name"], found["date"]) if found else None


def _results(path: Path) -> _Results:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise BadInput(f"{path} is no JSON ({error}); it was cut short or changed: copy it again") from error
    for part in ("results", "configs"):
        if not isinstance(content, dict) or not isinstance(content.get(part), dict):
            raise BadInput(f"{path} is no results file of lm-eval 0.4.3 or later (it has no {part}); {RERUN}")
    return _Results(path, str(DATED.fullmatch(path.stem)["date"]), content)  # type: ignore[index]


def _check_whole(folder: Path, runs: Sequence[_Results], samples: Mapping[Any, Path]) -> None:
    if not runs and not samples:
        raise BadInput(
            f"{folder} holds no logs of lm-eval (results_*.json and samples_*.jsonl); give the folder that "
            f"--output_path named, or {RERUN}"
        )
    if runs and not samples:
        raise BadInput(f"{folder} holds {runs[0].path.name}, but no samples_*.jsonl; {RERUN}")
    dated = {(run.path.parent, run.date) for run in runs}
    alone = [path.name for (parent, _, date), path in samples.items() if (parent, date) not in dated]
    if alone:
        raise BadInput(
            f"{folder} holds {alone[0]}{_more(alone)}, but no results file of the same date beside it, which says how "
            f"it was measured; copy it, too, or {RERUN}"
        )
    if len(models := sorted({run.model() for run in runs})) > 1:
        raise BadInput(f"{folder} holds logs of several models ({', '.join(models)}); give the folder of one")


def _newest(folder: Path, runs: Sequence[_Results]) -> tuple[dict[str, _Results], list[str]]:
    """Return the newest run of each benchmark, and a line for those of which there were older ones."""
    by_name: dict[str, list[_Results]] = {}
    for run in sorted(runs, key=lambda run: run.date):
        for name in run.benchmarks():
            by_name.setdefault(name, []).append(run)
    several = [name for name, own in by_name.items() if len(own) > 1]
    said = [f"{folder}: of {', '.join(several)} the newest log is read, older ones are left out"] if several else []
    return {name: own[-1] for name, own in by_name.items()}, said


def _log(name: str, run: _Results, samples: Mapping[Any, Path]) -> Log:
    path = samples.get((run.path.parent, f"{SAMPLES}{name}", run.date))
    if path is None:
        raise BadInput(
            f"{run.path}, the newest that measured {name}, has no {SAMPLES}{name}_{run.date}.jsonl beside it; copy "
            f"that, too, remove the results file to read an older log, or {RERUN}"
        )
    content = run.content
    config, metadata = content["configs"][name], content["configs"][name].get("metadata") or {}
    try:
        return Log(
            name=name,
            path=str(path),
            sha256=sha256_of_file(path),
            conditions=_conditions(name, content),
            reported={key: str(value) for key, value in content["results"][name].items() if "," in key},
            higher_is_better=_directions(config, content.get("higher_is_better", {}).get(name) or {}),
            documents=(content.get("n-samples", {}).get(name) or {}).get("effective"),
            known_chance=metadata.get("chance"),
            lm_eval=str(content.get("lm_eval_version") or ""),
            arguments=_arguments(content),
        )
    except (ValidationError, AttributeError, TypeError, KeyError) as error:
        raise BadInput(f"{run.path}: what it says of {name} is not lm-eval's ({error}); {RERUN}") from error


def _conditions(name: str, content: Mapping[str, Any]) -> Conditions:
    config = content["configs"][name]
    examples = (content.get("n-shot") or {}).get(name, config.get("num_fewshot"))
    # without examples, or without a template, it does nothing
    in_turns = content.get("fewshot_as_multiturn") and examples and content.get("chat_template_sha")
    taken = {field: config[field] for field in Conditions.model_fields if field in config}
    return Conditions.model_validate(
        taken
        | {
            "version": (content.get("versions") or {}).get(name),
            "num_fewshot": examples,
            "chat_template": content.get("chat_template_sha"),
            "system_instruction": content.get("system_instruction_sha"),
            "fewshot_as_multiturn": bool(in_turns),
            "window": _window(content) if config.get("output_type") == ROLLING else None,
        }
    )


def _window(content: Mapping[str, Any]) -> int | None:
    """Return how many tokens of a whole text are read at once; None where the log does not say."""
    known = content.get("max_length")
    return known - SHORTER.get(_source(content), 0) if isinstance(known, int) else None


def _arguments(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model's arguments that may change what it is asked, and the tokens that a prompt is cut to."""
    given = (content.get("config") or {}).get("model_args") or {}
    if isinstance(given, str):  # before lm-eval 0.4.9: "pretrained=org/name,add_bos_token=True"
        given = dict(part.partition("=")[::2] for part in given.split(","))
    known = {name: str(given[name]) for name in ARGUMENTS if name in given}
    return known | ({"max_length": content["max_length"]} if content.get("max_length") else {})


def _source(content: Mapping[str, Any]) -> str:
    return str(content.get("model_source") or (content.get("config") or {}).get("model") or "")


def _directions(config: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return whether more is better, by metric; None where the log does not say."""
    listed = {str(entry["metric"]): entry.get("higher_is_better") for entry in config.get("metric_list") or ()}
    return {name: known.get(name, value) for name, value in listed.items()} | dict(known)


def _short(model: str, folder: Path) -> str:
    """Return a name for people: org/name as it is, of a path its last part."""
    is_path = model.startswith(("/", ".", "~")) or model.count("/") > 1
    return (Path(model).name if is_path else model) or folder.name


def _more(names: Iterable[str]) -> str:
    count = len(list(names)) - 1
    return f" and {count} more" if count else ""
