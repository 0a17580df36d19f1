"""The reports of the data folder as web pages, on this machine only: what lies below reports/, and nothing else.

    python -m flows._report_server PORT

The pages have no scripts and may load nothing from elsewhere, which the browser is told with each of them.
"""

import sys
from html import escape
from urllib.parse import quote

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from flows._reports import PAGES, reports
from flows._servers import HOST

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # a report may be written again
}


class Pages(StaticFiles):
    """Files below a folder, none of which may run anything; links that lead out of it are not followed."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """Return a file; texts that no browser shows as pages, such as model cards, as plain text."""
        response = await super().get_response(path, scope)
        if path.endswith(".md"):
            response.headers["Content-Type"] = "text/plain; charset=utf-8"
        response.headers.update(HEADERS)
        return response


def listing(_: Request) -> Response:
    """List the reports, the newest first."""
    pages = [page for name in PAGES for page in reports().glob(f"*/{name}")]
    pages.sort(key=lambda page: page.stat().st_mtime, reverse=True)
    links = (f'<li><a href="/reports/{quote(p.parent.name)}/{p.name}">{escape(p.parent.name)}</a></li>' for p in pages)
    body = f"<ul>{''.join(links)}</ul>" if pages else "<p>No report yet.</p>"
    title = "<!doctype html><meta charset=utf-8><title>Reports</title><h1>Reports</h1>"
    return HTMLResponse(title + body, headers=HEADERS)


def application() -> Starlette:
    """Return the application that serves the reports of this data folder."""
    reports().mkdir(parents=True, exist_ok=True)
    routes = [
        Route("/", listing),
        Route("/health", lambda _: PlainTextResponse("ok")),
        Mount("/reports", Pages(directory=reports())),
    ]
    local = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])  # no other name leads here
    return Starlette(routes=routes, middleware=[local])


if __name__ == "__main__":
    uvicorn.run(application(), host=HOST, port=int(sys.argv[1]), log_level="warning")
