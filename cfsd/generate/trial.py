"""Whether a model can be sampled exactly: a few tokens are sampled, and one forward pass is asked for them again."""

from pathlib import Path
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cfsd.errors import BadInput, NotFinite
from cfsd.generate.key_value_cache import preallocated
from cfsd.generate.sampling import Rows, sample
from cfsd.generate.spec import GenerateSpec
from cfsd.model.architecture import context_of
from cfsd.model.loading import skeleton
from cfsd.process.child import is_out_of_memory

PROMPTS, LENGTH = (1, 3), 12  # tokens
MAX_DIFFERENCE = {torch.float64: 0.01, torch.float32: 0.01}  # nats per token, on average over the trial
MAX_DIFFERENCE_HALF = 0.25  # in 16 bits a product differs with the number of rows in it
SLOWER = "sampled through transformers' generate: this kind of model keeps a state of its own kind"
REMEDY = "the table of architectures in the documentation has families that work, such as Llama, Qwen and Gemma"

_tried: WeakSet[PreTrainedModel] = WeakSet()


def check_sampling(model: PreTrainedModel) -> None:
    """Check that tokens written one after another have the probabilities that one forward pass gives them.

    Once for each loaded model; a dozen tokens. Raises BadInput naming the model's class.
    """
    if model in _tried:
        return
    name = type(model).__name__
    try:
        difference = _difference(model)
    except NotFinite:  # the sampling itself will say where
        return
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise BadInput(f"{name} cannot be sampled here: {error}; {REMEDY}") from error
    if not difference <= MAX_DIFFERENCE.get(model.dtype, MAX_DIFFERENCE_HALF):
        raise BadInput(
            f"{name} gives sampled tokens log-probabilities that differ by {difference:.3g} nats from those of a "
            f"forward pass over the same text, so its text would not follow its distribution; {REMEDY}"
        )
    _tried.add(model)


@torch.inference_mode()
def _difference(model: PreTrainedModel) -> float:
    """Return the mean difference in nats over the tokens of the trial."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    prompts = [torch.randint(vocabulary, (count,), generator=generator).tolist() for count in PROMPTS]
    differences: list[Tensor] = []
    room = (context_of(model.config.to_dict()).tokens or LENGTH + max(PROMPTS)) - max(PROMPTS)
    spec = GenerateSpec(length=max(1, min(LENGTH, room)), seed=0)
    for row in sample(model, Rows(range(len(prompts)), prompts, ()), spec):
        ids_1T = torch.tensor([row.token_ids], device=model.device)
        law_TV = model(input_ids=ids_1T, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        once_T = law_TV.gather(1, ids_1T[0, 1:, None])[:, 0].cpu()
        recorded = [(t, value) for t, value in enumerate(row.logprobs) if value is not None]
        differences += [(once_T[t - 1] - value).abs() for t, value in recorded]
    return float(torch.stack(differences).mean())


def slower_path(folder: Path) -> str | None:
    """Return the line that says that a model of this configuration is sampled by a slower path; reads no weights."""
    model = skeleton(folder)
    return None if model is None or preallocated(model, 1) else SLOWER
