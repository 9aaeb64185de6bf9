"""OpenAI's completions interface: what of it is understood, and the form of answers and errors. No network here."""

import secrets
import time
import uuid

from keras_fam.serve.errors import BadRequest, ServeError, Unavailable

# Fields that are understood only at the value which asks for nothing.
NEUTRAL = {
    "n": (1,), "best_of": (1,), "echo": (False,), "logprobs": (False, 0), "top_logprobs": (0,), "suffix": ("",),
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "tools": ([],), "tool_choice": ("none",),
    "response_format": ({"type": "text"},), "parallel_tool_calls": (True, False), "store": (False,),
}  # fmt: skip
IGNORED = {"user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"}
COMMON = {"model", "temperature", "top_p", "seed", "stop", "stream", "stream_options", "max_tokens", "session"}
OWN = {"completion": {"prompt"}, "chat": {"messages", "max_completion_tokens"}}
ROLES = ("system", "developer", "user", "assistant")
DEFAULT_TOKENS = {"completion": 16, "chat": 256}


def parse(kind, body, model_name, request_id=None):
    """What a request asks for, as a `call`: a dict of plain values that any process understands.

    Args:
        kind: `"completion"` or `"chat"`.
        body: the request's JSON.
        model_name: the name of the only model.
        request_id: None, or what tells a repeated request from a new one.

    Raises:
        BadRequest: for what is not understood.
        ServeError: with status 404 for another model.
    """
    if not isinstance(body, dict):
        raise BadRequest(f"The body of a request is a JSON object; received {type(body).__name__}.")
    for name, value in body.items():
        if name in NEUTRAL:
            if value is not None and value not in NEUTRAL[name]:
                raise BadRequest(f"`{name}` is not supported; received {value!r:.80}. Leave it out.", name)
        elif name not in COMMON | OWN[kind] | IGNORED:
            raise BadRequest(f"There is no field `{name!s:.40}` in this request. Leave it out.", name)
    if body.get("model", model_name) != model_name:
        error = ServeError(f"The only model here is {model_name!r}; received {body['model']!r:.80}. Name it.", "model")
        error.status, error.code = 404, "model_not_found"
        raise error
    stops = body.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or len(stops) > 4 or not all(isinstance(stop, str) and stop for stop in stops):
        raise BadRequest(f"`stop` is one to four strings; received {body['stop']!r:.80}.", "stop")
    for name, kind_of in (("stream", bool), ("stream_options", dict)):
        if not isinstance(body.get(name), kind_of | None):
            raise BadRequest(f"`{name}` is a {kind_of.__name__} or null; received {body[name]!r:.80}.", name)
    session = body.get("session")
    if session is not None and not isinstance(session, str):
        raise BadRequest(
            f'`session` is the name of a session, "new", or null for none; received {session!r:.80}.', "session"
        )
    limits = (body.get("max_completion_tokens"), body.get("max_tokens"), DEFAULT_TOKENS[kind])
    seed, temperature, top_p = body.get("seed"), body.get("temperature"), body.get("top_p")
    call = {
        "kind": kind,
        "session": secrets.token_urlsafe(32) if session == "new" else session,
        "create": session == "new",
        "request_id": request_id or uuid.uuid4().hex,
        "stream": bool(body.get("stream")),
        "usage": bool((body.get("stream_options") or {}).get("include_usage")),
        "stop": stops,
        "max_tokens": next(limit for limit in limits if limit is not None),
        "temperature": 1.0 if temperature is None else temperature,
        "top_p": 1.0 if top_p is None else top_p,
        # Drawn here, so that a turn which is taken up elsewhere draws the same tokens.
        "seed": secrets.randbits(63) if seed is None else seed,
    }
    return call | ({"prompt": _prompt(body)} if kind == "completion" else {"messages": _messages(body)})


def _prompt(body):
    """A str, or a list of ids."""
    prompt = body.get("prompt", "")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    ids = isinstance(prompt, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in prompt)
    if prompt is not None and not isinstance(prompt, str) and not ids:
        raise BadRequest(f"`prompt` is one text, or token ids; received {prompt!r:.80}. Send one at a time.", "prompt")
    return prompt or []


def _messages(body):
    """A list of `{"role", "content"}`, both str."""
    messages, found = body.get("messages"), []
    if not isinstance(messages, list) or not messages:
        raise BadRequest(f"`messages` is a list of at least one message; received {messages!r:.80}.", "messages")
    for message in messages:
        role, content = (message.get(name) if isinstance(message, dict) else None for name in ("role", "content"))
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            content = "".join(str(part.get("text", "")) for part in content)
        if role not in ROLES or not isinstance(content, str):
            raise BadRequest(
                f"A message has a role ({', '.join(ROLES)}) and a text as content; received {message!r:.120}.",
                "messages",
            )
        found.append({"role": role, "content": content})
    return found


# Answers --------------------------------------------------------------------------------------------------------


class Answer:
    """The answer to one call, whole or in chunks, out of the events of a worker (`worker.py`)."""

    def __init__(self, call, model_name):
        self.call, self.chat = call, call["kind"] == "chat"
        prefix = "chatcmpl" if self.chat else "cmpl"
        self.head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model_name}

    def whole(self, done):
        """The JSON of an answer, from the last event, which has all of it."""
        text = done["text"]
        content = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": done["done"], "token_ids": done["tokens"]}
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": [choice], "usage": usage(done), **self.place(done)}

    def place(self, done=None):
        """Which session this is, and how many tokens it has read at the end of the turn."""
        return {"session": self.call["session"], "position": done and done["position"]}

    def chunk(self, text, tokens, *, first=False, done=None):
        """The JSON of a piece."""
        if self.chat:
            content = {"delta": {**({"role": "assistant"} if first else {}), "content": text}}
        else:
            content = {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": done and done["done"], "token_ids": tokens}
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": [choice], **self.place(done)}

    def last(self, done):
        """The JSON that counts tokens after the last piece, where it was asked for."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": [], "usage": usage(done), **self.place(done)}


def usage(done):
    prompt, completion = done["prompt_tokens"], done["completion_tokens"]
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def error_event(error):
    """A `ServeError` as an event."""
    return {
        "error": {
            "message": str(error),
            "type": "invalid_request_error" if error.status < 500 else "server_error",
            "param": error.param,
            "code": error.code,
        },
        "status": error.status,
    }


def unavailable(reason):
    """The event that nothing can be had now."""
    return error_event(
        Unavailable(
            f"A process that runs turns was lost, and no other took the turn up ({reason:.200}). The session is as it "
            "was before, or the turn is done: send the request again with the same Idempotency-Key."
        )
    )
