"""Requests to a completions server: how often one is made again, and which errors it may end in."""

import asyncio
import os
import random
from functools import cache
from ssl import SSLContext
from typing import Any

import httpx

from cfsd.errors import BadInput, Crashed
from cfsd.generate.server.protocol import Answer, read_answer
from cfsd.machine import KEY_VARIABLE, Machine

TOO_MANY, BROKEN = 429, 500
ATTEMPTS = 7
KEPT = "finished shards are kept: start the server and run the same command again"
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds between attempts, doubled each time; the longest binds the server, too
SECONDS = httpx.Timeout(600.0, connect=10.0)  # for one answer, its time in the server's queue included


class ServerGone(Crashed):
    """A server did not answer although it was asked again and again. Worth a retry: finished shards are kept."""


class Refused(BadInput):
    """A server answered that it will not do what it was asked."""


@cache
def _certificates() -> SSLContext:
    return httpx.create_ssl_context(trust_env=False)


class Client:
    """One connection to a server.

    A pool of 16 connections looks at all of them at every request, which doubled the time of short requests.
    """

    def __init__(self, machine: Machine, attempts: int = ATTEMPTS, remedy: str = KEPT) -> None:
        """Prepare; nothing is sent yet. After `attempts` without an answer the error ends with `remedy`."""
        self.base_url, self.attempts, self.remedy = machine.base_url or "", attempts, remedy
        self.key = os.environ.get(KEY_VARIABLE, "").strip()
        self.http = httpx.AsyncClient(
            base_url=self.base_url,
            headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
            timeout=SECONDS,
            verify=_certificates() if self.base_url.startswith("https:") else False,
            trust_env=False,
        )

    async def aclose(self) -> None:
        """Close the connection."""
        await self.http.aclose()

    async def complete(self, body: dict[str, Any]) -> Answer:
        """Return the completion of one prompt."""
        return read_answer(await self.ask("POST", "/completions", body))

    async def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Return the JSON of an answer. Raises Refused (what it will not do) or ServerGone (no answer)."""
        for attempt in range(self.attempts):
            wanted = None
            try:
                response = await self.http.request(method, path, json=body)
            except httpx.RequestError as error:
                problem = self._redacted(f"{type(error).__name__}: {error}")
            else:
                if response.status_code == httpx.codes.OK:
                    return self._json(response)
                problem = f"{response.status_code}: {self._message(response)}"
                if response.status_code < BROKEN and response.status_code != TOO_MANY:
                    raise Refused(f"the server {self.base_url} refused {method} {path}, {problem}")
                wanted = response.headers.get("Retry-After")
            if attempt + 1 < self.attempts:
                await asyncio.sleep(_seconds(attempt, wanted))
        raise ServerGone(
            f"the server {self.base_url} gave no answer to {method} {path} in {self.attempts} attempts (the last: "
            f"{problem}); {self.remedy}"
        )

    def _message(self, response: httpx.Response) -> str:
        try:
            body = response.json()
            error = body.get("error") or body.get("detail") or body.get("message") or body
            text = str(error.get("message", error) if isinstance(error, dict) else error)
        except (ValueError, AttributeError):
            text = response.text
        return self._redacted(" ".join(text.split()))[:500]

    def _redacted(self, text: str) -> str:
        return text.replace(self.key, "***") if self.key else text

    def _json(self, response: httpx.Response) -> Any:
        try:
            return response.json()
        except ValueError as error:
            raise Refused(
                f"{self.base_url} does not answer in JSON; give the base URL of a completions server"
            ) from error


def _seconds(attempt: int, wanted: str | None) -> float:
    """Return how long to wait: what the server asks for, else twice the last time, with jitter."""
    if wanted is not None and wanted.strip().isdigit():
        return min(float(wanted), LONGEST_WAIT)
    return min(FIRST_WAIT * 2.0**attempt, LONGEST_WAIT) * random.uniform(0.5, 1)
