"""The settings of a benchmark of the user's own: types, and what must be there, without importing lm-eval."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from cfsd.errors import BadInput
from cfsd.evaluate.benchmark_files import Definition

# lm-eval takes the first of these that a benchmark gives.
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
DEFAULT_LIMIT = 256  # lm-eval's

Text = Annotated[str, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[int, Field(strict=True, ge=1)]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]


class _Metric(BaseModel):
    model_config = ConfigDict(extra="allow")

    metric: Text
    aggregation: Text | None = None
    higher_is_better: Flag | None = None


class _Step(BaseModel):
    model_config = ConfigDict(extra="allow")

    function: Text


class _Filter(BaseModel):
    name: Text
    filter: list[_Step] = Field(min_length=1)


class _Fewshot(BaseModel):
    model_config = ConfigDict(extra="allow")

    split: Text | None = None
    samples: Text | list[dict[str, Any]] | None = None


class _Generation(BaseModel):
    model_config = ConfigDict(extra="allow")

    until: Text | list[Text] = []
    do_sample: Flag | None = None
    top_k: Count | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Field(strict=True, gt=0)] | None = None
    num_beams: Positive | None = None
    temperature: Annotated[float, Field(strict=True, ge=0)] = 0.0
    max_gen_toks: Positive | None = None
    max_new_tokens: Positive | None = None
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None


class _Settings(BaseModel):
    model_config = ConfigDict(extra="allow")

    task: Text
    dataset_path: Text | None = None
    dataset_name: Text | None = None
    dataset_kwargs: dict[Text, Any] | None = None
    custom_dataset: Text | None = None
    training_split: Text | None = None
    validation_split: Text | None = None
    test_split: Text | None = None
    fewshot_split: Text | None = None
    process_docs: Text | None = None
    process_results: Text | None = None
    doc_to_text: Text | int | None = None
    doc_to_target: Text | int | list[JsonValue] | None = None
    doc_to_choice: Text | list[Any] | dict[str, Any] | None = None
    description: Text | None = None
    target_delimiter: Text = " "
    fewshot_delimiter: Text = "\n\n"
    gen_prefix: Text | None = None
    fewshot_config: _Fewshot | None = None
    num_fewshot: Count | None = None
    metric_list: list[_Metric] | None = Field(None, min_length=1)
    filter_list: list[_Filter] | None = Field(None, min_length=1)
    generation_kwargs: _Generation | None = None
    repeats: Positive = 1

    def splits(self) -> dict[str, str]:
        """Return the split that each setting names."""
        named = ("training_split", "validation_split", "test_split", "fewshot_split")
        splits = {name: split for name in named if (split := getattr(self, name))}
        fewshot = self.fewshot_config.split if self.fewshot_config else None
        return splits | ({"fewshot_config.split": fewshot} if fewshot else {})


def length_limit(settings: Mapping[str, Any], default: int = DEFAULT_LIMIT) -> int:
    """Return the most tokens of an answer that generation `settings` allow."""
    return int(next((settings[name] for name in LIMITS if settings.get(name) is not None), default))


def check_settings(name: str, definition: Definition) -> None:
    """Raise BadInput, with the name of the benchmark and its setting, for what lm-eval cannot work with."""
    place = f"benchmark {name}, {definition.place()}"
    try:
        settings = _Settings.model_validate(definition.config)
    except ValidationError as error:
        raise BadInput(f"{place}: {_mistaken(error.errors()[0], definition.config)}; correct it") from error
    if "class" in definition.config:
        return  # a task in Python decides itself what it needs
    if reason := _missing(settings, definition.config) or _absent_split(settings):
        raise BadInput(f"{place}: {reason}")


def _mistaken(error: Any, config: dict[str, Any]) -> str:
    """Return what is wrong with which setting; pydantic puts names of our types into the place too."""
    *above, last = (
        str(part) for part in error["loc"] if isinstance(part, int) or part in str(config) or part.islower()
    )
    if error["type"] == "missing":
        return f"{'.'.join(above) or 'it'} has no {last}"
    return f"{'.'.join([*above, last])} is {error['input']!r}: {error['msg']}"


def _missing(settings: _Settings, config: dict[str, Any]) -> str | None:
    if config.get("doc_to_image") is not None or config.get("doc_to_audio") is not None:
        return "doc_to_image and doc_to_audio ask for a model that sees or hears; text alone can be scored"
    if config.get("use_prompt") is not None:
        return "use_prompt takes its prompt from elsewhere; write it as doc_to_text and doc_to_target"
    if not (settings.dataset_path or settings.custom_dataset):
        return "it has no dataset_path; set `dataset_path: json` and `dataset_kwargs: {data_files: {test: FILE}}`"
    if not (settings.test_split or settings.validation_split):
        return "it has neither test_split nor validation_split; name the split that is scored"
    metadata = config.get("metadata")
    chance = metadata.get("chance") if isinstance(metadata, dict) else None
    if chance is not None and not (isinstance(chance, int | float) and 0 <= chance < 1):
        return f"metadata.chance is {chance!r}; it needs the score of guessing, from 0 to below 1"
    templated = metadata.get("chat_template", False) if isinstance(metadata, dict) else False
    if not isinstance(templated, bool):
        return f"metadata.chat_template is {templated!r}; it needs true or false"
    needed = ["doc_to_text", "doc_to_target"]
    needed += ["doc_to_choice"] if config.get("output_type") == "multiple_choice" else []
    absent = [key for key in needed if config.get(key) is None]
    return f"it has no {' and no '.join(absent)}; a field of the documents or a template is needed" if absent else None


def _absent_split(settings: _Settings) -> str | None:
    """Return what is wrong where the data files say which splits there are."""
    files = (settings.dataset_kwargs or {}).get("data_files")
    if not files or settings.custom_dataset:
        return None
    known = list(files) if isinstance(files, dict) else ["train"]
    for setting, split in settings.splits().items():
        if split not in known:
            return f"{setting} is {split!r}, but its data files have {', '.join(known)}; name one of these"
    return None
