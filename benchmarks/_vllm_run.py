"""vLLM's engine without a server, for the sampling benchmark; runs under vLLM's own python, with nothing of ours.

python _vllm_run.py MODEL_FOLDER ROWS LENGTH LIKELIEST      jobs in, answers out: one JSON a line, as _sampling_run.py
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams  # type: ignore[import-not-found]


def main() -> None:
    """Load the model, then do the jobs that come on standard input."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM talks on standard output
    engine = Engine(sys.argv[1], *map(int, sys.argv[2:]))
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(getattr(engine, job.pop("do"))(**job)), file=answers)


class Engine:
    """vLLM with the model in `folder`, in float32."""

    def __init__(self, folder: str, rows: int, length: int, likeliest: int) -> None:
        """Load it for rows of up to `length` tokens, `rows` at a time, with up to `likeliest` alternatives a token."""
        self.llm = LLM(
            folder, dtype="float32", max_model_len=length, max_num_seqs=rows, max_logprobs=likeliest,
            enforce_eager=True, enable_prefix_caching=False, disable_log_stats=True,
        )  # fmt: skip
        self.start = json.loads((Path(folder) / "start_token.json").read_text())["start_token"]

    def whole(self, rows: int, length: int, seed: int = 0, top: int = 0) -> dict[str, Any]:
        """Sample `rows` rows of `length` tokens behind the start token, none of which ends, with log-probabilities."""
        params = SamplingParams(
            temperature=1.0, top_p=1.0, top_k=-1, max_tokens=length, ignore_eos=True, logprobs=top, detokenize=False
        )
        prompts = [{"prompt_token_ids": [self.start]} for _ in range(rows)]
        started = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        assert all(len(output.outputs[0].logprobs) == length for output in outputs)
        return {"seconds": seconds, "tokens": tokens}


if __name__ == "__main__":
    main()
