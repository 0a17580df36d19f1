"""A small completions server on 127.0.0.1 over a transformers model: real HTTP, real sampling, ways to misbehave."""

import json
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

GOOD = 200
MOST_STOPS = 4  # as in vLLM
_laws: dict[PreTrainedModel, dict[tuple[int, ...], torch.Tensor]] = {}  # tests ask for the same beginnings


@dataclass
class Manners:
    """How the server behaves; the defaults are vLLM's, well-behaved."""

    owned_by: str = "vllm"
    models: list[str] = field(default_factory=lambda: ["tiny"])
    temperature: float | None = None  # in place of what is asked for
    top_k: int | None = None
    scale_logprobs: bool = False  # report them after temperature
    strings: bool = False  # give pieces of text, no ids
    text_prompts: bool = False  # refuse ids as prompts
    chat: bool = True
    no_content: int = 0  # of so many chats the first is answered with null; 1: each
    extra_start: bool = False  # put a start token before every prompt
    list_end: bool = True
    count_end: bool = False  # although it is not listed
    hidden: tuple[int, ...] = ()  # sampled and counted, never listed
    own_stops: tuple[int, ...] = ()  # stop there too, whatever is asked for
    echo: bool = True
    context: int = 10_000
    max_logprobs: int = 20
    no_logprobs: bool = False
    failures: dict[int, int] = field(default_factory=dict)  # number of the completion request -> status; 0: hang up
    retry_after: str | None = None
    die_after: int | None = None  # completions, then every request is hung up on
    seconds: float = 0.0  # before each answer
    complaint: str = "nothing is wrong"  # the body of a failure; {key} is the Authorization header


class Loopback:
    """The server's state: what it was asked, how many asked at once."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, manners: Manners) -> None:
        self.model, self.tokenizer, self.manners = model, tokenizer, manners
        self.lock = threading.Lock()
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.now = self.most = self.chats = 0
        self.distributions = _laws.setdefault(model, {})
        self.url = ""

    def arrive(self, body: dict[str, Any], headers: dict[str, str]) -> int:
        with self.lock:
            self.requests.append(body)
            self.headers.append(headers)
            self.now += 1
            self.most = max(self.most, self.now)
            return len(self.requests) - 1

    def leave(self) -> None:
        with self.lock:
            self.now -= 1

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> torch.Tensor:
        """Return the next token's."""
        key = tuple(ids)
        with self.lock:
            if key not in self.distributions:
                self.distributions[key] = self.model(torch.tensor([ids]), use_cache=False).logits[0, -1].float()
            return self.distributions[key]

    def text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def prompt(self, body: dict[str, Any]) -> list[int]:
        ids = body["prompt"]
        if isinstance(ids, str):
            ids = self.tokenizer.encode(ids, add_special_tokens=False)
        elif isinstance(ids[0], list):  # a batch of one
            (ids,) = ids
        return [0, *ids] if self.manners.extra_start else list(ids)

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a conversation, whose template is its texts as they are."""
        prompt = "".join(message["content"] for message in body["messages"])
        answer = self.complete({**body, "prompt": prompt})
        (choice,) = answer["choices"]
        with self.lock:
            self.chats += 1
            silent = self.manners.no_content and self.chats % self.manners.no_content == 1 % self.manners.no_content
        content, finish = (None, "length") if silent else (choice["text"], choice["finish_reason"])
        message = {"role": "assistant", "content": content}
        return {"choices": [{"index": 0, "message": message, "finish_reason": finish}]}

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a request that is in order."""
        prompt = self.prompt(body)
        sampled: list[int] = []
        shown: list[tuple[int, float | None, dict[int, float] | None]] = []
        generator = torch.Generator().manual_seed(body.get("seed", 0))
        finish, ends = "length", body.get("stop") or []
        if body.get("echo"):
            with torch.inference_mode():
                along = self.model(torch.tensor([prompt]), use_cache=False).logits[0].float()
            seen = (self._seen(logits, token, body) for logits, token in zip(along, prompt[1:], strict=False))
            shown = [(prompt[0], None, None), *((token, *of) for token, of in zip(prompt[1:], seen, strict=True))]
        for step in range(min(body["max_tokens"], self.manners.context - len(prompt))):
            logits = self.logits([*prompt, *sampled])
            token = self._draw(logits, body, generator, step)
            sampled.append(token)
            shown.append((token, *self._seen(logits, token, body)))
            if token in {*self.manners.own_stops, *self._stops(body)}:
                finish = "stop"
                break
            if any(end in self.text(sampled) for end in ends):
                break
        if finish == "stop" and not self.manners.list_end:
            shown.pop()
        shown = [entry for entry in shown if entry[0] not in self.manners.hidden]
        return self._answer(prompt, sampled, shown, finish, body)

    def _stops(self, body: dict[str, Any]) -> list[int]:
        asked = body.get("stop_token_ids") or []
        return asked if body.get("ignore_eos") else [*asked, self.tokenizer.eos_token_id]

    def _draw(self, logits: torch.Tensor, body: dict[str, Any], generator: torch.Generator, step: int) -> int:
        for token, bias in (body.get("logit_bias") or {}).items():
            logits = logits.clone()
            logits[int(token)] += bias
        temperature = self.manners.temperature or body.get("temperature", 1)
        top_k = self.manners.top_k or body.get("top_k", -1)
        if not temperature:
            return int(logits.argmax())
        logits = logits / temperature
        if step < body.get("min_tokens", 0):
            logits = logits.clone()
            logits[self._stops(body)] = -torch.inf
        if top_k > 0:
            logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
        return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))

    def _seen(self, logits: torch.Tensor, token: int, body: dict[str, Any]) -> tuple[float, dict[int, float]]:
        if self.manners.scale_logprobs:
            logits = logits / (self.manners.temperature or body["temperature"])
        logprobs = logits.log_softmax(-1)
        best = logprobs.topk(min(body.get("logprobs") or 0, len(logprobs)))
        top = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return logprobs[token].item(), {token: logprobs[token].item(), **top}

    def _answer(
        self, prompt: list[int], sampled: list[int], shown: list[Any], finish: str, body: dict[str, Any]
    ) -> dict[str, Any]:
        def name(token: int) -> str:
            return self.text([token]) if self.manners.strings else f"token_id:{token}"

        text = self.text(sampled[:-1] if finish == "stop" else sampled)
        for end in body.get("stop") or []:
            text = text.partition(end)[0]
        choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": finish}
        if not self.manners.no_logprobs and "logprobs" in body:
            choice["logprobs"] = {
                "tokens": [name(token) for token, _, _ in shown],
                "token_logprobs": [logprob for _, logprob, _ in shown],
                "top_logprobs": [top and {name(token): value for token, value in top.items()} for *_, top in shown],
            }
        if not self.manners.strings:
            choice |= {"token_ids": [token for token, _, _ in shown], "prompt_token_ids": prompt}
        counted = len(sampled) - (finish == "stop" and not (self.manners.list_end or self.manners.count_end))
        return {"choices": [choice], "usage": {"prompt_tokens": len(prompt), "completion_tokens": counted}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # one packet per answer: two would wait for each other's acknowledgement, 40 ms
    server: "_Server"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        loop = self.server.loop
        if self.path != "/v1/models":
            return self._send(404, {"error": {"message": "Not Found"}})
        known = {"owned_by": loop.manners.owned_by, "max_model_len": loop.manners.context}
        self._send(GOOD, {"data": [{"id": name, **known} for name in loop.manners.models]})

    def do_POST(self) -> None:
        loop, manners = self.server.loop, self.server.loop.manners
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        number = loop.arrive(body, dict(self.headers))
        try:
            time.sleep(manners.seconds)
            dead = manners.die_after is not None and number >= manners.die_after
            status = 0 if dead else manners.failures.get(number, self._judged(body))
            if not status:
                self.close_connection = True
                return
            complaint = manners.complaint.format(key=self.headers.get("Authorization"))
            answer = loop.chat if self.path == "/v1/chat/completions" else loop.complete
            self._send(status, answer(body) if status == GOOD else {"error": {"message": complaint}})
        finally:
            loop.leave()

    def _judged(self, body: dict[str, Any]) -> int:
        manners = self.server.loop.manners
        if len(body.get("stop") or []) > MOST_STOPS:
            manners.complaint = "stop: List should have at most 4 items"
            return 400
        if "messages" in body:
            return GOOD if manners.chat else 404
        if manners.text_prompts and not isinstance(body["prompt"], str):
            manners.complaint = "prompt: Input should be a valid string"
            return 422
        if body.get("logprobs", 0) > manners.max_logprobs:
            manners.complaint = f"Requested sample logprobs of {body['logprobs']}, which is greater than max allowed"
            return 400
        if body.get("echo") and not manners.echo:
            manners.complaint = "Only no echo is supported"
            return 400
        return GOOD

    def _send(self, status: int, body: Any) -> None:
        data = json.dumps(body, default=lambda value: None if math.isnan(value) else value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if self.server.loop.manners.retry_after and status != GOOD:
            self.send_header("Retry-After", self.server.loop.manners.retry_after)
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    loop: Loopback

    def handle_error(self, *_: Any) -> None:
        """Say nothing: clients that gave up are part of the tests."""


@contextmanager
def serving(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, manners: Manners | None = None, port: int = 0
) -> Iterator[Loopback]:
    """Serve `model` until the block ends."""
    loop = Loopback(model, tokenizer, manners or Manners())
    server = _Server(("127.0.0.1", port), _Handler)
    server.loop = loop
    loop.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
