"""An engine behind calls of plain values (`protocol.py`): text in, events out. One per process that holds a model."""

import asyncio
import contextlib

from keras_fam.serve.errors import BadRequest, ServeError
from keras_fam.serve.protocol import error_event
from keras_fam.serve.text import ChatFormat, TurnText
from keras_fam.serve.turn import Request
from keras_fam.streaming.text import find_stop_tokens, tokenize


class Worker:
    """Runs calls in an engine.

    Args:
        engine: `SessionEngine`.
        chat: `ChatFormat`.
        name: str, what this process is called in its statistics.
    """

    def __init__(self, engine, chat=None, name="0"):
        self.engine, self.model, self.chat, self.name = engine, engine.model, chat or ChatFormat(), name
        self.has_tokenizer = getattr(getattr(self.model, "preprocessor", None), "tokenizer", None) is not None
        self.stops = find_stop_tokens(self.model, "auto") if self.has_tokenizer else ()

    async def turn(self, call):
        """Events of one turn, an asynchronous generator.

        Dicts: `index` (of the first token), `tokens` and `pieces` (their texts) as tokens come, if the call streams;
        then `done` (`"stop"` or `"length"`) with `position`, `prompt_tokens` and `completion_tokens`, and with
        `text` and `tokens`, which is what was not in an event before. Or, at any time, `error` and `status`, the last
        event. If nobody waits for the events any more, the turn is cancelled and undone.
        """
        try:
            turn = self.engine.submit(self._request(call))
        except ServeError as error:
            yield error_event(error)
            return
        loop, changed, text, given = asyncio.get_running_loop(), asyncio.Event(), TurnText(self.model, call["stop"]), 0

        def wake():
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(changed.set)

        try:
            turn.listen(wake)
            while True:
                changed.clear()
                finished = turn.finished  # before the tokens are counted
                if call["stream"] and len(turn.tokens) > given:
                    tokens = turn.tokens[given:]
                    yield {"index": given, "tokens": tokens, "pieces": [text.add(token) for token in tokens]}
                    given += len(tokens)
                elif finished:
                    break
                else:
                    await changed.wait()
        finally:
            turn.leave()
        if turn.error is not None:
            yield error_event(turn.error)
            return
        left = turn.tokens[given:]
        yield {
            "done": turn.reason,
            "text": "".join([text.add(token) for token in left]) + text.finish(),
            "tokens": left,
            "position": turn.position,
            "prompt_tokens": turn.prompt_tokens,
            "completion_tokens": len(turn.tokens),
        }

    def _request(self, call):
        until = None
        if call["stop"]:
            text = TurnText(self.model, call["stop"])

            def until(token):
                text.add(token)
                return text.stopped

        def ids(before):
            given = call["prompt"] if call["kind"] == "completion" else self.chat.write(call["messages"], before)
            return tokenize(self.model, given, start=before.position == 0) if isinstance(given, str) else given

        if not self.has_tokenizer and (call["kind"] == "chat" or isinstance(call["prompt"], str)):
            raise BadRequest(
                f"{self.model.name} has no tokenizer, so it reads token ids; received text. Send `prompt` as a list of "
                "ids to /v1/completions.",
                "prompt" if call["kind"] == "completion" else "messages",
            )
        options = {name: call[name] for name in OPTIONS}
        return Request(ids, stop_token_ids=self.stops, until=until, **options)

    async def delete(self, session):
        """Deletes a session: None, or the event of an error."""
        return await self._call(self.engine.delete, session)

    async def place(self, session):
        """`{"position": …}`, how many tokens a session has read at the end of its last turn; or an error's event."""
        return await self._call(self.engine.ledger.place, session)

    async def _call(self, function, *args):
        try:
            return await asyncio.get_running_loop().run_in_executor(None, function, *args)
        except ServeError as error:
            return error_event(error)

    async def statistics(self):
        """`{name: snapshot}` of the engine."""
        return {self.name: self.engine.snapshot()}


OPTIONS = ("max_tokens", "temperature", "top_p", "seed", "session", "create", "request_id")
