"""Batches of texts for training: token ids, and the few positions that the loss is on."""

import queue
import threading
import typing

import numpy as np

import keras_fam

SHORT_NEEDLE = keras_fam.tasks.Needle(digits=3, cities=0.0)
CITY = keras_fam.tasks.Needle(cities=1.0)  # where somebody was born, one of 23 cities
MIXTURES = {  # what texts ask for, by the value of --mixture; None is all of `ProseTask`
    "standard": None,
    "needle": SHORT_NEEDLE,
    "city": CITY,
    "city_and_books": [(CITY, 0.6), (keras_fam.tasks.Book(), 0.4)],
}
ASKED = {"needle": (SHORT_NEEDLE,), "city": (CITY,), "city_and_books": (CITY,)}  # in an evaluation
POSITIONS = 48  # of the loss in a row: more than the answers of most texts have


class Batch(typing.NamedTuple):
    """A step's texts.

    Attributes:
        token_ids: int32 `[B, T]`.
        positions: int32 `[B, K]`, whose outputs are used.
        targets: int32 `[B, K]`.
        weights: float32 `[B, K]`, 0 where there is no target.
        answer: bool `[B, K]`, the targets that are the text's last answer.
        names: list of str, what each text asks for; `""` without a question.
    """

    token_ids: typing.Any
    positions: typing.Any
    targets: typing.Any
    weights: typing.Any
    answer: typing.Any
    names: list


def make_task(prepared, args, **options):
    """The mixture of texts, with facts beyond the window of the model."""
    window = (args.segments + 1) * args.block
    options = {"min_distance": window, "early_tokens": args.block, **options}
    options.setdefault("mixture", MIXTURES[args.mixture])
    return keras_fam.tasks.ProseTask(prepared.train, prepared.tokenizer, held_out=prepared.held_out, **options)


def draw(task, rows, tokens, seed, split="train", positions=POSITIONS):
    """A `Batch` of `rows` texts of `tokens` tokens that follows from `seed` (a sequence of int) alone."""
    rng = np.random.default_rng(seed)
    shape = (rows, positions)
    ids, at, targets = np.zeros((rows, tokens), "int32"), np.zeros(shape, "int32"), np.zeros(shape, "int32")
    weights, answer, names = np.zeros(shape, "float32"), np.zeros(shape, bool), []
    for row in range(rows):
        text = task.text(tokens, seed=rng, split=split)
        ids[row] = text.token_ids
        learned = np.flatnonzero(text.weights)
        learned = learned[learned > 0]
        if len(learned) > positions:  # of a book, or of many answers, a part: the last answer is always in it
            last = learned[learned >= text.answers[-1].start] if text.answers else learned[:0]
            rest = np.setdiff1d(learned, last[-positions:])
            some = rng.permutation(rest)[: positions - len(last[-positions:])]
            learned = np.sort(np.concatenate([some, last[-positions:]]))
        count = len(learned)
        at[row, :count], targets[row, :count] = learned - 1, text.token_ids[learned]
        weights[row, :count] = text.weights[learned]
        if text.answers:
            last = text.answers[-1]
            answer[row, :count] = (last.start <= learned) & (learned < last.stop)
        names.append(text.answers[-1].name if text.answers else "")
    return Batch(ids, at, targets, weights, answer, names)


class Ahead:
    """Draws the batches of one length in a thread of its own, a few ahead of training.

    Args:
        draw: function of a number that returns a batch.
        first: int, the first number.
        size: int, batches that are held at most.
    """

    def __init__(self, draw, first, size=4):
        self._draw, self._next, self._stopped = draw, first, threading.Event()
        self._queue = queue.Queue(size)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        try:
            while not self._stopped.is_set():
                self._put(self._draw(self._next))
                self._next += 1
        except BaseException as error:  # raised where the batch is wanted
            self._put(error)

    def _put(self, item):
        while not self._stopped.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def get(self):
        """The next batch; raises what drawing it raised."""
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def stop(self):
        """Ends the thread."""
        self._stopped.set()
        self._thread.join()
