"""Which path leads where: every interface's routes, the page, and what a server says of itself.

Knows paths, and whose words an error on a path has. What an interface's fields mean is the interface's own.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from mlx_qwen35 import __version__
from mlx_qwen35.machine.files import listed
from mlx_qwen35.serving import http
from mlx_qwen35.serving.endpoint import Endpoint
from mlx_qwen35.serving.guard import Doors, Guard
from mlx_qwen35.serving.http import GoneError, Receive, Scope, Send
from mlx_qwen35.serving.metrics import MEDIA_TYPE, Metrics
from mlx_qwen35.serving.refusal import Refusal

if TYPE_CHECKING:
    from mlx_qwen35.serving.catalogue import Question
    from mlx_qwen35.serving.exchange import Api
    from mlx_qwen35.serving.pool import Pool

log = logging.getLogger("mlx_qwen35.serving")

# Path, module of serving, class: what a model answers. Of several paths that begin a request's, the longest has the
# words of its errors.
ASKED = (
    ("/v1/chat/completions", "apis.openai_chat", "ChatCompletions"),
    ("/v1/completions", "apis.openai_completions", "Completions"),
    ("/v1/responses", "apis.openai_responses", "Responses"),
    ("/v1/messages", "apis.anthropic", "Messages"),
    ("/api/v1/chat", "apis.lmstudio", "LMStudioChat"),
    ("/api/v0/chat/completions", "apis.openai_chat", "ChatCompletions"),
    ("/api/v0/completions", "apis.openai_completions", "Completions"),
    ("/api/chat", "apis.ollama", "OllamaChat"),
    ("/api/generate", "apis.ollama", "OllamaGenerate"),
)
# Modules with questions(catalogue), which no model answers.
QUESTIONS = ("openai_words", "lmstudio_lists", "ollama_lists")
# What begins a path -> the path among ASKED whose words its errors have.
WORDS = (("/api/v", "/api/v1/chat"), ("/api/", "/api/chat"), ("/v1/messages", "/v1/messages"))

PAGE = Path(__file__).with_name("page")
_TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".css": "text/css"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def build(pool: Pool, doors: Doors, metrics: Metrics | None = None) -> Guard:
    """The whole application."""
    metrics = metrics or Metrics()
    apis = dict(_apis())
    routes = [
        Route(path, Endpoint(api, pool, metrics, doors.most_bytes), methods=["POST"]) for path, api in apis.items()
    ]
    for question in _questions(pool, apis):
        routes.append(Route(question.path, Questions(question, metrics, doors.most_bytes), methods=[question.method]))
    pages = dict(_pages())
    routes += [Route(path, _page(file), methods=["GET"]) for path, file in pages.items()]
    routes += [
        Route("/health", _health(pool), methods=["GET"]),
        Route("/metrics", lambda request: Response(metrics.text(pool), media_type=MEDIA_TYPE), methods=["GET"]),
    ]

    def refuse(path: str, refusal: Refusal) -> Mapping[str, object]:
        metrics.request(path if path in apis else "other", refusal.status)
        log.info("%s %d: %s", path[:100], refusal.status, refusal.message)
        return refused(path, refusal, apis)

    async def wrong(request: Request, error: Exception) -> Response:
        path, status = request.url.path, getattr(error, "status_code", 500)
        kinds = {
            404: ("not_found", f"there is no {path[:100]} here"),
            405: ("not_allowed", _other_method(request, error)),
        }
        refusal = Refusal(*kinds.get(status, ("broken", "the server failed")))
        headers = {name: value for name, value in (getattr(error, "headers", None) or {}).items()}
        return JSONResponse(refuse(path, refusal), refusal.status, headers)

    app = Starlette(routes=routes, exception_handlers={HTTPException: wrong})
    app.router.redirect_slashes = False
    doors = Doors(**{**vars(doors), "open_paths": doors.open_paths | pages.keys()})
    return Guard(app, doors, refuse)


def refused(path: str, refusal: Refusal, apis: Mapping[str, Api]) -> Mapping[str, Any]:
    """An error in the words of the interface that a path is of."""
    api = apis.get(path) or next((apis.get(of) for begin, of in WORDS if path.startswith(begin)), None)
    api = api or apis.get("/v1/chat/completions")
    if api is not None:
        return api.refused(refusal)
    return {"error": {"message": refusal.message, "type": refusal.kind, "param": refusal.param, "code": None}}


class Questions:
    """An ASGI application: a question that no model answers."""

    def __init__(self, question: Question, metrics: Metrics, most_bytes: int) -> None:
        self._question, self._metrics, self._most_bytes = question, metrics, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        question, status = self._question, 200
        head = scope["method"] == "HEAD"
        with suppress(GoneError):
            try:
                body = await http.read_json(await http.read_body(receive, self._most_bytes))
                value = await question.answer(body, scope.get("path_params", {}))
                await http.send_json(send, 200, value, head=head)
            except GoneError:
                raise
            except Exception as error:
                refusal = Refusal.of(error)
                status = refusal.status
                if refusal.kind == "broken":
                    log.exception("%s failed", question.path, exc_info=error)
                await http.send_refusal(send, refusal, question.refused(refusal), head=head)
        self._metrics.request(question.path, status)


def _apis() -> Iterator[tuple[str, Api]]:
    made: dict[tuple[str, str], Api] = {}
    for path, module, name in ASKED:
        if find_spec(f"mlx_qwen35.serving.{module}") is None:
            continue
        if (module, name) not in made:
            made[module, name] = getattr(import_module(f"mlx_qwen35.serving.{module}"), name)()
        yield path, made[module, name]


def _questions(pool: Pool, apis: Mapping[str, Api]) -> Iterator[Question]:
    for module in QUESTIONS:
        if find_spec(f"mlx_qwen35.serving.{module}") is not None:
            yield from import_module(f"mlx_qwen35.serving.{module}").questions(pool)
    for api in dict.fromkeys(apis.values()):  # such as what it keeps of earlier answers
        if hasattr(api, "questions"):
            yield from api.questions(pool)


def _other_method(request: Request, error: Exception) -> str:
    allowed = (getattr(error, "headers", None) or {}).get("Allow", "another method")
    return f"{request.method} is not for {request.url.path[:100]}: use {allowed}"


def _pages() -> Iterator[tuple[str, Path]]:
    """The files of the page, each at its name; the page itself at /."""
    for file in sorted(listed(PAGE, "*")):
        if file.suffix in _TYPES:
            yield ("/" if file.name == "index.html" else f"/{file.name}"), file


def _page(file: Path) -> Callable[[Request], Awaitable[Response]]:
    headers = {
        "content-security-policy": _POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }

    async def show(request: Request) -> Response:
        return FileResponse(file, media_type=_TYPES[file.suffix], headers=headers)

    return show


def _health(pool: Pool) -> Callable[[Request], Awaitable[Response]]:
    async def health(request: Request) -> Response:
        ok = not pool.closing
        state = {"status": "ok" if ok else "closing", "version": __version__}
        return JSONResponse(state, 200 if ok else 503)

    return health
