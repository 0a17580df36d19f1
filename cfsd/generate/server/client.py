"""Requests to a completions server: where it is, how often it is asked again, which errors it may give."""

import asyncio
import os
import random
from typing import Any, Self

import httpx

from cfsd.errors import BadInput, Crashed
from cfsd.generate.server.protocol import Answer, Connection, read_answer
from cfsd.machine import KEY_VARIABLE

TOO_MANY, BROKEN = 429, 500
LONGEST_WAIT = 60.0  # seconds between attempts, whatever the server asks for


class ServerGone(Crashed):
    """A server did not answer although it was asked again and again. Worth a retry: finished shards are kept."""


class Refused(BadInput):
    """A server answered that it will not do what it was asked."""


class Client:
    """Asks one server, again where that can help."""

    def __init__(self, connection: Connection) -> None:
        """Prepare for `connection`; nothing is sent yet."""
        self.connection = connection
        self.key = os.environ.get(KEY_VARIABLE, "").strip()
        secure = connection.base_url.startswith("https:")
        self.verify = httpx.create_ssl_context(trust_env=connection.trust_env) if secure else False
        self.all: list[httpx.AsyncClient] = []
        self.idle: list[httpx.AsyncClient] = []

    async def __aenter__(self) -> Self:
        """Open it."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close what is open."""
        for http in self.all:
            await http.aclose()

    async def _request(self, method: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
        """Send it over an idle connection.

        Each connection has a client of its own, because a pool looks at all its connections at every request: 16 of
        them doubled the time of short requests.
        """
        http = self.idle.pop() if self.idle else self._another()
        try:
            return await http.request(method, path, json=body)
        finally:
            self.idle.append(http)

    def _another(self) -> httpx.AsyncClient:
        timeout = httpx.Timeout(self.connection.timeout, connect=min(10.0, self.connection.timeout))
        http = httpx.AsyncClient(
            base_url=self.connection.base_url,
            headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
            timeout=timeout,
            verify=self.verify,
            trust_env=self.connection.trust_env,
        )
        self.all.append(http)
        return http

    async def complete(self, body: dict[str, Any]) -> Answer:
        """Return the completion of one prompt."""
        return read_answer(await self.ask("POST", "/completions", body))

    async def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Return the JSON of an answer. Raises Refused (what it will not do) or ServerGone (no answer)."""
        attempts = self.connection.retries + 1
        for attempt in range(attempts):
            wanted = None
            try:
                response = await self._request(method, path, body)
            except httpx.RequestError as error:
                problem = self._redacted(f"{type(error).__name__}: {error}")
            else:
                if response.status_code == httpx.codes.OK:
                    return self._json(response)
                problem = f"{response.status_code}: {self._message(response)}"
                if response.status_code < BROKEN and response.status_code != TOO_MANY:
                    raise Refused(f"the server {self.connection.base_url} refused {method} {path}, {problem}")
                wanted = response.headers.get("Retry-After")
            if attempt + 1 < attempts:
                await asyncio.sleep(self._seconds(attempt, wanted))
        raise ServerGone(
            f"the server {self.connection.base_url} gave no answer to {method} {path} in {attempts} attempts (the "
            f"last: {problem}); finished shards are kept: start the server and run the same command again"
        )

    def _seconds(self, attempt: int, wanted: str | None) -> float:
        """Return how long to wait: what the server asks for, else twice the last time, with jitter."""
        if wanted is not None and wanted.strip().isdigit():
            return min(float(wanted), LONGEST_WAIT)
        return min(self.connection.backoff * 2.0**attempt, LONGEST_WAIT) * random.uniform(0.5, 1)

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
                f"{self.connection.base_url} does not answer in JSON; give the base URL of a completions server"
            ) from error
