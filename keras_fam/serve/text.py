"""Text of turns: conversations as one text, and pieces of text that end before a stop string."""

import dataclasses

from keras_fam.streaming.text import TextPieces


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """How messages are written for a model. Only new messages are written; the session has read the others.

    Args:
        message: a message, with `{role}` and `{content}`.
        reply: what asks for the model's answer.
        after_reply: what stands between an answer that ended by itself (its stop token has been read) and the next
            message.
        after_cut: the same after an answer that was cut off at its largest length.
    """

    message: str = "{role}: {content}\n"
    reply: str = "assistant:"
    after_reply: str = "\n"
    after_cut: str = "\n"

    def write(self, messages, before):
        """The text of new messages, for a stream that stands at `Before`."""
        start = {"stop": self.after_reply, "length": self.after_cut}.get(before.reason, "")
        return start + "".join(self.message.format(**message) for message in messages) + self.reply


CHATML = ChatFormat(
    message="<|im_start|>{role}\n{content}<|im_end|>\n",
    reply="<|im_start|>assistant\n",
    after_reply="\n",
    after_cut="<|im_end|>\n",
)
FORMATS = {"plain": ChatFormat(), "chatml": CHATML}


class TurnText:
    """The text of one turn, token by token, up to a stop string.

    Args:
        model: a language model; without a tokenizer, its text is the ids with spaces between them.
        stops: strings that end the text and are no part of it.
    """

    def __init__(self, model, stops=()):
        has_tokenizer = getattr(getattr(model, "preprocessor", None), "tokenizer", None) is not None
        self._pieces = TextPieces(model) if has_tokenizer else None
        self._stops, self._held, self._any, self.stopped = tuple(stops), "", False, False

    def add(self, token):
        """The text that is certain now: what may be the start of a stop string is held back."""
        if self._pieces is None:
            piece, self._any = f" {token}" if self._any else f"{token}", True
        else:
            piece = self._pieces.add(token)
        return self._take(piece)

    def finish(self):
        """What was held back, at the end of the turn."""
        piece = self._take("" if self._pieces is None else self._pieces.finish())
        held, self._held = self._held, ""
        return piece + held

    def _take(self, piece):
        if self.stopped:
            return ""
        text = self._held + piece
        found = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        longest = max(map(len, self._stops), default=1) - 1
        starts = range(max(0, len(text) - longest), len(text))
        cut = next((i for i in starts if any(stop.startswith(text[i:]) for stop in self._stops)), len(text))
        self._held = text[cut:]
        return text[:cut]
