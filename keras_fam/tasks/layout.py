"""Where facts and questions stand in a text."""

import dataclasses
import typing

import numpy as np

from keras_fam.tasks import phrases


class Answer(typing.NamedTuple):
    """An answer in a text.

    Attributes:
        start, stop: int, the positions of its first token, and after its last one.
        distance: int, tokens between the last time that the text said it, or the last of the facts that it follows
            from, and `start`.
        name: str, of what was asked: the `name` of a `Facts`.
    """

    start: int
    stop: int
    distance: int
    name: str


class TaskText(typing.NamedTuple):
    """A text of a task.

    Attributes:
        token_ids: int32 `[T]`.
        weights: float32 `[T]`, the loss weight of each token as a target.
        answers: list of `Answer`s, in the order of the text.
    """

    token_ids: np.ndarray
    weights: np.ndarray
    answers: list


@dataclasses.dataclass(frozen=True)
class Layout:
    """Places the statements of an `Exercise` at gaps between the sentences of a text, and its questions at the end.

    Args:
        encode: function from str to int32 `[T]`.
        min_distance: int, tokens of the text that separate all statements from their questions, and a question from the
            same one later, as far as the text is long enough. Above the window of a model, so that the answer has left
            it.
        early: float from 0 to 1, the share of texts whose statements all stand within the first `early_tokens` tokens;
            in the others they stand anywhere before the questions.
        early_tokens: int.
        again: float from 0 to 1, the share of texts whose questions are asked at a random place too, not only at the
            end: the same questions, so that the answer must outlast its use.
        frames: pairs `(before, after)` of str around a question and its answer, with `{question}` in the first.
        phrasings: `"all"`, `"train"` or `"held_out"`.

    Raises:
        ValueError: for options outside their range.
    """

    encode: typing.Callable
    min_distance: int = 256
    early: float = 0.5
    early_tokens: int = 128
    again: float = 0.2
    frames: tuple = phrases.FRAMES
    phrasings: str = "all"

    def __post_init__(self):
        for name in ("early", "again"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is a share from 0 to 1. Received: {name}={getattr(self, name)}")
        for name in ("min_distance", "early_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative. Received: {name}={getattr(self, name)}")
        if not self.frames or any("{question}" not in before for before, _ in self.frames):
            raise ValueError(f"`frames` must be pairs of str, the first with {{question}}. Received: {self.frames!r}")
        phrases.check_which(self.phrasings)

    def place(self, rng, exercise, prose, total, name):
        """A `TaskText` of `total` tokens with the statements and questions of an exercise.

        Args:
            rng: `numpy.random.Generator`.
            exercise: `Exercise`.
            prose: `Prose`.
            total: int, T.
            name: str, of the answers.

        Raises:
            ValueError: if the statements and questions alone have more than `total` tokens.
        """
        statements = [self.encode(" " + statement) for statement in exercise.statements]
        asked = [self._asked(rng, question) for question in exercise.questions]
        room = total - sum(map(len, statements)) - sum(map(_size, asked))
        if room < 0:
            raise ValueError(
                f"A text must have room for its statements and questions. Received: total_tokens={total}, and "
                f"{total - room} tokens of {name!r} alone. Raise the length, or lower the number of facts."
            )
        earlier = [self._asked(rng, question) for question in exercise.questions] if rng.random() < self.again else []
        first, span = None, room - sum(map(_size, earlier))
        if earlier and span > 2 * self.min_distance:  # far from the statements, and from the questions at the end
            first, room = int(rng.integers(self.min_distance, span - self.min_distance + 1)), span
        ids, gaps, _ = prose.window(rng, room)
        gaps = np.concatenate([[0], gaps])
        last = (room if first is None else first) - self.min_distance
        if rng.random() < self.early:
            last = min(last, self.early_tokens)
        places = _at_gaps(gaps, np.sort(rng.integers(0, max(last, 0) + 1, len(statements))))
        inserted = [
            (place, piece, number) for number, (place, piece) in enumerate(zip(places, statements, strict=True))
        ]
        if first is not None:
            inserted.append((int(_at_gaps(gaps, np.array([first]))[0]), earlier, None))
        inserted.append((room, asked, None))
        return _join(ids, inserted, exercise.questions, name)

    def _asked(self, rng, question):
        """Token ids of a question, of its answer, and of what follows."""
        before, after = self.frames[rng.integers(len(self.frames))]
        return (
            self.encode(before.format(question=question.text)),
            self.encode(" " + question.answer),
            self.encode(after),
        )


def _size(asked):
    return sum(map(len, asked))


def _at_gaps(gaps, places):
    """The last gap at or before each place."""
    return gaps[np.searchsorted(gaps, places, side="right") - 1].tolist()


def _join(ids, inserted, questions, name):
    """The text with its insertions, `(place, piece, number of the statement or None for questions)` in order."""
    parts, weights, answers, length, read = [], [], [], 0, 0
    said = {}  # position after each statement
    known = {}  # by question, position after its answer where it was asked before

    def add(piece, weight=0.0):
        nonlocal length
        parts.append(piece)
        weights.append(np.full(len(piece), weight, "float32"))
        length += len(piece)

    for place, piece, number in inserted:
        add(ids[read:place])
        read = place
        if number is not None:
            add(piece)
            said[number] = length
            continue
        for i, (before, answer, after) in enumerate(piece):
            add(before)
            since = max(known.get(i, 0), *(said[need] for need in questions[i].needs))
            answers.append(Answer(length, length + len(answer), length - since, name))
            add(answer, 1.0)
            known[i] = length
            add(after)
            weights[-1][:1] = 1.0  # the end of the answer is learned, too
    return TaskText(np.concatenate(parts).astype("int32"), np.concatenate(weights), answers)
