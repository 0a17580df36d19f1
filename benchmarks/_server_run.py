"""One contender of the benchmark of the server engine, in a process of its own.

python -m benchmarks._server_run ours|loop URL MODEL_FOLDER        jobs in, answers out: one JSON a line

ours: the client that samples a shard. loop: the same requests, written beforehand, over as many plain connections; of
an answer it reads its length, and counts tokens when the time is up.
"""

import asyncio
import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cfsd.generate.server.protocol import VLLM, Served, ServerSampling, request
from cfsd.generate.server.sampler import row_seed, sample_from_server
from cfsd.generate.spec import GenerateSpec
from cfsd.machine import Machine
from cfsd.model.loading import load_tokenizer, read_eos_ids, read_start_token
from cfsd.model.sample import Sample

Answer = dict[str, Any]


def main() -> None:
    """Do the jobs that come on standard input."""
    role, url, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    contender = Contender(role, url, folder)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(getattr(contender, job.pop("do"))(**job)), flush=True)


class Contender:
    """Our client, or the plainest one."""

    def __init__(self, role: str, url: str, folder: Path) -> None:
        """Read the tokenizer and the ends of the model in `folder`; the server at `url` serves it."""
        self.role, self.url = role, url
        self.tokenizer, self.ends, self.start = load_tokenizer(folder), read_eos_ids(folder), read_start_token(folder)

    def sample(self, rows: int, length: int, in_flight: int, top: int, seed: int) -> Answer:
        """Sample rows from the start token; return seconds, tokens, and seconds of this process's own work."""
        machine = Machine(engine="server", base_url=self.url, in_flight=in_flight)
        spec = GenerateSpec(rows=rows, length=length, top_logprobs=top, seed=seed)
        wanted = ServerSampling(machine, spec, self.ends, self.tokenizer, "bench")
        before = resource.getrusage(resource.RUSAGE_SELF)
        started = time.perf_counter()
        tokens = self._ours(wanted) if self.role == "ours" else self._loop(wanted)
        seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
        work = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return {"seconds": seconds, "tokens": tokens, "own_seconds": work}

    def _ours(self, wanted: ServerSampling) -> int:
        rows = range(wanted.spec.rows)
        samples = sample_from_server(wanted, [[self.start]] * len(rows), rows)
        return sum(len(sample.token_ids) - 1 for sample in samples if isinstance(sample, Sample))

    def _loop(self, wanted: ServerSampling) -> int:
        served = Served(VLLM, _model_of(self.url))
        bodies = [
            request(served, wanted, [self.start], max_tokens=wanted.spec.length, seed=row_seed(wanted, row, 0))
            for row in range(wanted.spec.rows)
        ]
        answers = asyncio.run(_all(self.url, bodies, wanted.machine.in_flight))
        return sum(json.loads(answer)["usage"]["completion_tokens"] for answer in answers)


def _model_of(url: str) -> str:
    from urllib.request import urlopen

    with urlopen(f"{url}/models") as response:
        return str(json.load(response)["data"][0]["id"])


async def _all(url: str, bodies: list[Answer], in_flight: int) -> list[bytes]:
    """Return the server's answers, `in_flight` of them awaited at a time."""
    parts, answers = urlsplit(url), list[bytes]()
    head = f"POST {parts.path}/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    sent = [json.dumps(body).encode() for body in bodies]
    waiting = iter([f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body for body in sent])

    async def work(waiting: Iterator[bytes]) -> None:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        for message in waiting:
            writer.write(message)
            headers = (await reader.readuntil(b"\r\n\r\n")).lower()
            assert b" 200 " in headers.split(b"\r\n", 1)[0], headers
            length = int(headers.split(b"content-length:")[1].split(b"\r\n")[0])
            answers.append(await reader.readexactly(length))
        writer.close()

    await asyncio.gather(*(work(waiting) for _ in range(in_flight)))
    return answers


if __name__ == "__main__":
    main()
