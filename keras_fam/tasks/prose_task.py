"""Tasks in natural text: a mixture of facts to remember, segments to repeat and books to read."""

import numpy as np

from keras_fam.tasks import phrases
from keras_fam.tasks.documents import check_split, task_generator
from keras_fam.tasks.facts import Facts, KeyValue, Needle
from keras_fam.tasks.layout import Layout
from keras_fam.tasks.prose import Prose, encoder
from keras_fam.tasks.segments import Book, RepeatedSegment
from keras_fam.tasks.who_is_where import WhoIsWhere


def standard_mixture():
    """What `ProseTask` mixes unless it is told otherwise, a list of pairs `(Facts, weight)`.

    Half needles (one, three and five of them), a quarter worlds of one to three facts, and records, repeated segments
    and books.

    Example:

    ```python
    mixture = [*keras_fam.tasks.standard_mixture(), (keras_fam.tasks.Needle(count=8), 0.2)]
    ```
    """
    return [
        (Needle(), 0.25),
        (Needle(count=3), 0.15),
        (Needle(count=5, questions=2), 0.1),
        (KeyValue(), 0.1),
        (WhoIsWhere(1), 0.1),
        (WhoIsWhere(2), 0.1),
        (WhoIsWhere(3), 0.05),
        (RepeatedSegment(weight=0.2), 0.1),
        (Book(weight=0.1), 0.05),
    ]


class ProseTask:
    """Texts in natural language in which something is to be remembered, mixed from several kinds.

    Statements stand at random gaps between the sentences of a text, questions about them at its end, in phrasings that
    are drawn for each of them. The loss is on the answers (and on the token after each, so that an answer ends).
    `keras_fam.data.TaskBatches` makes batches of texts of one length; `keras_fam.data.TaskDocuments` makes documents
    for `DocumentRows`, which streams them from step to step.

    Args:
        prose: `Prose`, the text around what is asked.
        tokenizer: see `encoder`; that of `prose`.
        mixture: None (`standard_mixture()`), a `Facts`, or a list of pairs `(Facts, weight)`: one of them is drawn for
            each text, with a probability in proportion to its weight.
        held_out: None (`prose`), or the `Prose` of the split `"held_out"`.
        min_distance, early, early_tokens, again, frames, phrasings: see `Layout`.
        seed: int, seed of the texts that are drawn without one.

    Raises:
        ValueError: for weights that are negative or all 0, and for options outside their range.
        TypeError: if `prose` is no `Prose`, or an entry of the mixture no `Facts`.

    Example:

    ```python
    task = keras_fam.tasks.ProseTask(prose, tokenizer, min_distance=2 * block_size)
    batches = keras_fam.data.TaskBatches(task, batch_size=8, block_size=128, blocks=8)
    ```
    """

    def __init__(
        self,
        prose,
        tokenizer,
        mixture=None,
        *,
        held_out=None,
        min_distance=256,
        early=0.5,
        early_tokens=128,
        again=0.2,
        frames=phrases.FRAMES,
        phrasings="all",
        seed=0,
    ):
        self.prose = {"train": prose, "held_out": prose if held_out is None else held_out}
        for name, text in zip(("prose", "held_out"), self.prose.values(), strict=True):
            if not isinstance(text, Prose):
                raise TypeError(f"`{name}` must be a `Prose`, as `Prose.from_texts` makes. Received: {type(text)}")
        mixture = standard_mixture() if mixture is None else mixture
        pairs = [(mixture, 1.0)] if isinstance(mixture, Facts) else list(mixture)
        for pair in pairs:
            if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], Facts):
                raise TypeError(f"`mixture` must be a Facts, or pairs (Facts, weight). Received the entry: {pair!r}")
        self.kinds, weights = [kind for kind, _ in pairs], np.array([weight for _, weight in pairs], "float64")
        if not len(pairs) or not np.isfinite(weights).all() or weights.min() < 0 or not weights.sum():
            raise ValueError(
                f"The weights of `mixture` must be at least 0, and one of them above. Received: {weights.tolist()}"
            )
        self._share = np.cumsum(weights / weights.sum())
        options = {"early": early, "early_tokens": early_tokens, "again": again, "frames": tuple(frames)}
        self.layout = Layout(encoder(tokenizer), min_distance=min_distance, phrasings=phrasings, **options)
        self._rng = np.random.default_rng(seed)

    def text(self, total_tokens, *, seed=None, split="train"):
        """One text, a `TaskText`.

        Args:
            total_tokens: int, T.
            seed: int or sequence of int (the same text every time), `numpy.random.Generator`, or None (the task's own
                generator).
            split: `"train"` or `"held_out"`, the part of the prose. One int seed gives different texts in the two.

        Raises:
            ValueError: if what is stated and asked has more than T tokens, or for an unknown split.
        """
        check_split(split)
        if isinstance(seed, tuple | list):
            seed = np.random.default_rng([*map(int, seed), int(split == "held_out")])
        rng = task_generator(self._rng, seed, split)
        kind = self.kinds[min(int(np.searchsorted(self._share, rng.random(), side="right")), len(self.kinds) - 1)]
        return kind.write(rng, int(total_tokens), self.prose[split], self.layout)

    def batch(self, batch_size, total_tokens, *, seed=None, split="train"):
        """One batch of B texts of T tokens.

        Args:
            batch_size: int, B.
            total_tokens, seed, split: see `text`.

        Returns:
            dict of `token_ids` and `targets` int32 `[B, T]`; `loss_weights` float32 `[B, T]`; `answer_positions` int32
            `[B, A]`, the positions whose *outputs* predict the tokens of each text's last answer, filled up with 0;
            `answers` int32 `[B, A]`, those tokens, filled up with -1, which `keras_fam.tasks.accuracy` leaves out (a
            text without a question, as of `Book`, has no other); `distances` int32 `[B]`, see `Answer` (0 without one);
            and `texts`, the list of `TaskText`s.

        Raises:
            ValueError: as `text`.
        """
        check_split(split)
        rng = task_generator(self._rng, seed, split)
        texts = [self.text(total_tokens, seed=rng, split=split) for _ in range(batch_size)]
        ids, weights = np.stack([text.token_ids for text in texts]), np.stack([text.weights for text in texts])
        nothing = np.zeros_like(ids[:, :1])
        last = [text.answers[-1] if text.answers else None for text in texts]
        longest = max([answer.stop - answer.start for answer in last if answer] or [0])
        positions, answers = np.zeros((batch_size, longest), "int32"), np.full((batch_size, longest), -1, "int32")
        for row, answer in enumerate(last):
            if answer:
                size = answer.stop - answer.start
                positions[row, :size] = np.arange(answer.start - 1, answer.stop - 1)
                answers[row, :size] = ids[row, answer.start : answer.stop]
        return {
            "token_ids": ids,
            "targets": np.concatenate([ids[:, 1:], nothing], axis=1),
            "loss_weights": np.concatenate([weights[:, 1:], nothing.astype("float32")], axis=1),
            "answer_positions": positions,
            "answers": answers,
            "distances": np.array([answer.distance if answer else 0 for answer in last], "int32"),
            "texts": texts,
        }
