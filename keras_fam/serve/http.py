"""The HTTP face: OpenAI's completions interface over anything that runs calls, a worker or replicas on a cluster."""

import json

from keras_fam.serve.errors import BadRequest, ServeError
from keras_fam.serve.protocol import Answer, error_event, parse
from keras_fam.serve.statistics import BUCKETS

RETRY_AFTER = {"Retry-After": "1"}  # seconds, for 429 and 503


def make_app(backend, model_name):
    """A FastAPI application.

    | | |
    | --- | --- |
    | `POST /v1/completions`, `/v1/chat/completions` | a turn, whole or streamed |
    | `GET /v1/models`, `/v1/models/{name}` | the model |
    | `GET /v1/sessions/{name}`, `DELETE` | how much a session has read; deletes it |
    | `GET /health`, `/metrics` | whether turns are run; counters in Prometheus' text format |

    Args:
        backend: a `Worker`, or an object with its asynchronous methods `turn`, `delete`, `place` and `statistics`.
        model_name: what the model is called.

    Raises:
        ImportError: without FastAPI, which comes with Ray Serve.
    """
    try:
        from fastapi import FastAPI
    except ImportError as error:
        raise ImportError("The server needs FastAPI and Ray: pip install 'keras-fam[ray]'.") from error
    face = Face(backend, model_name)
    app = FastAPI(title="keras_fam", docs_url=None, redoc_url=None, openapi_url=None)
    routes = {
        ("POST", "/v1/completions"): face.completions,
        ("POST", "/v1/chat/completions"): face.chat,
        ("GET", "/v1/models"): face.models,
        ("GET", "/v1/models/{name:path}"): face.model,
        ("GET", "/v1/sessions/{name}"): face.session,
        ("DELETE", "/v1/sessions/{name}"): face.delete,
        ("GET", "/health"): face.health,
        ("GET", "/metrics"): face.metrics,
    }
    for (method, path), answer in routes.items():
        app.add_route(path, answer, methods=[method])
    return app


class Face:
    """Requests to calls, events to responses."""

    def __init__(self, backend, model_name):
        self.backend, self.model_name = backend, model_name

    async def completions(self, request):
        return await self._turn("completion", request)

    async def chat(self, request):
        return await self._turn("chat", request)

    async def _turn(self, kind, request):
        from fastapi.responses import StreamingResponse

        try:
            try:
                body = json.loads(await request.body())
            except ValueError as error:
                raise BadRequest(f"The body of a request is JSON; it could not be read ({error}).") from error
            call = parse(kind, body, self.model_name, request.headers.get("idempotency-key"))
        except ServeError as error:
            return _refusal(error_event(error))
        events, answer = self.backend.turn(call), Answer(call, self.model_name)
        event = await anext(events)  # what is refused is refused with a status
        if "error" in event:
            await events.aclose()
            return _refusal(event)
        if not call["stream"]:
            await events.aclose()
            return _json(answer.whole(event))
        return StreamingResponse(_lines(answer, event, events), media_type="text/event-stream")

    async def models(self, request):
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request):
        if request.path_params["name"] != self.model_name:
            error = ServeError(f"The only model here is {self.model_name!r}; name it.", "model")
            error.status, error.code = 404, "model_not_found"
            return _refusal(error_event(error))
        return _json(self._model())

    def _model(self):
        return {"id": self.model_name, "object": "model", "created": 0, "owned_by": "keras_fam"}

    async def session(self, request):
        name = request.path_params["name"]
        place = await self.backend.place(name)
        return _refusal(place) if "error" in place else _json({"id": name, "object": "session", **place})

    async def delete(self, request):
        name = request.path_params["name"]
        error = await self.backend.delete(name)
        return _refusal(error) if error else _json({"id": name, "object": "session.deleted", "deleted": True})

    async def health(self, request):
        found = await self.backend.statistics()
        return _json({"status": "ok" if found else "no engine", "engines": sorted(found)}, 200 if found else 503)

    async def metrics(self, request):
        from fastapi.responses import PlainTextResponse

        return PlainTextResponse(prometheus(await self.backend.statistics()), media_type="text/plain; version=0.0.4")


async def _lines(answer, event, events):
    """Server-sent events of a streamed answer."""
    first = True
    while "done" not in event:
        if "error" in event:  # too late for a status
            yield _line({"error": event["error"]})
            return
        yield _line(answer.chunk("".join(event["pieces"]), event["tokens"], first=first))
        first, event = False, await anext(events)
    await events.aclose()
    yield _line(answer.chunk(event["text"], event["tokens"], first=first, done=event))
    if answer.call["usage"]:
        yield _line(answer.last(event))
    yield "data: [DONE]\n\n"


def _line(content):
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _json(content, status=200, headers=None):
    from fastapi.responses import JSONResponse

    return JSONResponse(content, status_code=status, headers=headers)


def _refusal(event):
    status = event["status"]
    return _json({"error": event["error"]}, status, RETRY_AFTER if status in (429, 503) else None)


# Metrics --------------------------------------------------------------------------------------------------------

COUNTERS = {
    "turns": "Turns that ended well.",
    "steps": "Steps of the batch.",
    "rows_read": "Rows that read tokens in the steps of the batch; over steps and rows, the batch fill.",
    "loads": "Sessions read from the store.",
    "saves": "Sessions written to the store.",
    "store_failures": "Calls of the store that failed after all attempts.",
    "resumed": "Turns taken up from a stored middle.",
    "replayed": "Requests whose turn had been done.",
}
GAUGES = {
    "rows": "Rows of the batch.",
    "running": "Turns that run.",
    "waiting": "Turns that wait for a row.",
    "sessions": "Sessions at hand.",
}


def prometheus(snapshots):
    """The statistics of engines by name, in Prometheus' text format."""
    lines = []

    def family(name, kind, text, samples):
        lines.append(f"# HELP keras_fam_{name} {text}")
        lines.append(f"# TYPE keras_fam_{name} {kind}")
        lines.extend(f"keras_fam_{name}{end}{{{labels}}} {value}" for end, labels, value in samples)

    engines = {f'engine="{name}"': found for name, found in sorted(snapshots.items())}
    for name, text in GAUGES.items():
        family(name, "gauge", text, [("", label, found[name]) for label, found in engines.items()])
    for name, text in COUNTERS.items():
        family(f"{name}_total", "counter", text, [("", label, found[name]) for label, found in engines.items()])
    family(
        "tokens_total",
        "counter",
        "Tokens that were read, given or generated.",
        [
            ("", f'{label},kind="{kind}"', found[f"{kind}_tokens"])
            for label, found in engines.items()
            for kind in ("prompt", "generated")
        ],
    )
    family(
        "failures_total",
        "counter",
        "Turns that failed, by the code of their error.",
        [("", f'{label},code="{c}"', n) for label, found in engines.items() for c, n in found["failures"].items()],
    )
    samples = []
    for label, found in engines.items():
        total = 0
        for bound, count in zip([*BUCKETS, "+Inf"], found["first_token_counts"], strict=True):
            total += count
            samples.append(("_bucket", f'{label},le="{bound}"', total))
        samples += [("_sum", label, round(found["first_token_seconds"], 6)), ("_count", label, total)]
    family("first_token_seconds", "histogram", "Time from a request's arrival to its first token.", samples)
    return "\n".join(lines) + "\n"
