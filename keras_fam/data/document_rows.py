"""Long documents as contiguous rows: row b of a batch continues row b of the batch before.

Shuffled pieces of text teach no memory (the paper calls it the curse of IID). Here a document stays in its row until it
ends; `reset` marks the rows that start another one, and `StreamingModel.fit` carries the state.
"""

from typing import Any, NamedTuple

import numpy as np

from keras_fam.data.resumable import ResumableDataset, check_shard

_KEPT = 256  # places that are cached, so that access near one of them is cheap
_TURN, _OFFSET, _END, _FRESH = range(4)  # columns of a place


class Document(NamedTuple):
    """A text that is read from start to end.

    Attributes:
        token_ids: int `[T]`, T >= 2.
        weights: None (all 1), or float `[T]`, the loss weight of each token as a target. The first one is not used,
            since no token predicts it.
    """

    token_ids: Any
    weights: Any = None


class DocumentRows(ResumableDataset):
    """Documents, assigned to the rows of successive batches round-robin.

    ```python
    rows = keras_fam.data.DocumentRows(books, batch_size=8, chunk_tokens=4 * block_size, steps_per_epoch=100)
    stream = keras_fam.StreamingModel(lm, batch_size=8)
    stream.fit(rows, epochs=10)
    ```

    A batch is `({"token_ids": int32 [B, C], "reset": bool [B]}, targets int32 [B, C], weights float32 [B, C])`. Targets
    are the next tokens of the same document. The last chunk of a document is padded with `pad_id` at weight 0, so that
    every document starts at the start of a chunk and blocks stay aligned.

    Each pass shuffles the documents and assigns them one by one to all rows of all shards, so that each document is
    read once per pass, even if there are fewer documents than rows. A row that reaches the end of a document continues
    with its next one.

    Args:
        documents: a sequence (`len` and `[i]`, so it may load from disk) of int `[T]` token ids or `Document`s.
        batch_size: int, B, rows of this shard.
        chunk_tokens: int, C, tokens per row and batch; a multiple of the block size is fastest.
        longest: None, or int, tokens after which a row is reset within a document. May be changed between epochs, as
            `keras_fam.training.Curriculum` does; the new value applies to pieces that start later.
        shuffle: bool, whether the order of each pass is drawn from `seed`; otherwise that of `documents`.
        seed: int.
        shard: `(index, count)`, the index of this process among `count` processes. Together they read what one dataset
            with B · count rows reads.
        passes: None (no end), or int, how often all documents are read. Rows that are finished get padding at weight
            0, and `steps_per_epoch` is by default the number of batches until the rows of all shards are finished.
            Reading after the end raises ValueError, as does `fit` for more epochs than there is data for (except in
            a shard whose `steps_per_epoch` is given, since another shard may have documents left).
        pad_id: int, token id of the padding.
        steps_per_epoch, **kwargs: see `ResumableDataset`.

    Raises:
        ValueError: for sizes below 1, no documents, or a document with fewer than two tokens (when it is read).
    """

    def __init__(
        self,
        documents,
        batch_size,
        chunk_tokens,
        *,
        longest=None,
        shuffle=True,
        seed=0,
        shard=(0, 1),
        passes=None,
        pad_id=0,
        steps_per_epoch=None,
        **kwargs,
    ):
        super().__init__(steps_per_epoch, **kwargs)
        for name, size in (("batch_size", batch_size), ("chunk_tokens", chunk_tokens), ("passes", passes or 1)):
            if size < 1:
                raise ValueError(f"`{name}` must be a positive integer. Received: {name}={size}")
        if not len(documents):
            raise ValueError("`documents` must contain at least one document. Received none.")
        self.documents, self.batch_size, self.chunk_tokens = documents, batch_size, chunk_tokens
        self.shuffle, self.seed, self.shard, self.passes, self.pad_id = (
            shuffle,
            seed,
            check_shard(shard),
            passes,
            pad_id,
        )
        self._orders, self._opened, self._longest = {}, {}, longest
        self._check_longest(longest)
        self._places = {0: self._start()}
        self._ends = passes is not None and (shard[1] == 1 or steps_per_epoch is None)
        if passes is not None and steps_per_epoch is None:
            if shard[1] == 1:
                self.steps_per_epoch = max(self._left(), 1)
            else:  # the last one of all shards ends the epoch
                same = {"longest": longest, "shuffle": shuffle, "seed": seed, "passes": passes}
                self.steps_per_epoch = DocumentRows(documents, batch_size * shard[1], chunk_tokens, **same).num_batches

    @property
    def batches_left(self):
        """int, batches from `position` on until the rows are finished; None without end."""
        return self._left() if self._ends else None

    def _left(self):
        number = self.position
        while self._has_data(number):
            number += 1
        return number - self.position

    def _has_data(self, number):
        return bool((self._place_at(number)[:, _END] > 0).any())

    def __getitem__(self, index):
        if self._ends and not self._has_data(self.position):
            raise ValueError(
                f"All documents were read {self.passes} times, at batch {self.position}; what follows is padding. "
                "Make a new dataset, or use passes=None, which reads without end."
            )
        return super().__getitem__(index)

    @property
    def longest(self):
        return self._longest

    @longest.setter
    def longest(self, tokens):
        self._check_longest(tokens)
        place = self._place_at(self.position)
        self._places, self._longest = {self.position: place}, tokens

    def batch_at(self, number):
        """Batch `number` since the start. Access is random; its cost grows with the distance to cached batches."""
        place = self._place_at(number)
        shape = (self.batch_size, self.chunk_tokens)
        tokens, targets = np.full(shape, self.pad_id, "int32"), np.full(shape, self.pad_id, "int32")
        weights = np.zeros(shape, "float32")
        for row, (turn, offset, end, _) in enumerate(place.tolist()):
            stop = min(offset + self.chunk_tokens, end)
            if stop <= offset:
                continue
            ids, own = self._open(self._index(turn))
            size = stop - offset
            tokens[row, :size], targets[row, :size] = ids[offset:stop], ids[offset + 1 : stop + 1]
            weights[row, :size] = 1.0 if own is None else own[offset + 1 : stop + 1]
        return {"token_ids": tokens, "reset": place[:, _FRESH] > 0}, targets, weights

    def settings(self):
        own = {"batch_size": self.batch_size, "chunk_tokens": self.chunk_tokens, "shuffle": self.shuffle}
        own.update(seed=self.seed, shard=list(self.shard), passes=self.passes, documents=len(self.documents))
        return {**super().settings(), **own}

    def saved(self, number):
        return {"longest": self._longest, "rows": self._place_at(number).tolist()}

    def restore(self, number, saved):
        self._longest = saved["longest"]
        self._places = {int(number): np.array(saved["rows"], "int64")}

    @staticmethod
    def merge_states(states):
        """The position of a dataset with the rows of all shards, from `state_dict` of each shard in order."""
        first, shards = states[0], [state["settings"]["shard"] for state in states]
        if len(states) == 1:
            return first
        if shards != [[i, len(states)] for i in range(len(states))]:
            raise ValueError(
                f"Process i of n reads shard (i, n) of a dataset. Received: shards {shards}. Make it with "
                "shard=keras_fam.distribution.process_shard()."
            )
        settings = {**first["settings"], "batch_size": first["settings"]["batch_size"] * len(states), "shard": [0, 1]}
        return {**first, "settings": settings, "rows": [row for state in states for row in state["rows"]]}

    def part_of(self, state):
        """This shard's part of the position of a dataset with the rows of all shards; another position as it is."""
        index, count = self.shard
        settings = state.get("settings") or {}
        whole = {**self.settings(), "batch_size": self.batch_size * count, "shard": [0, 1]}
        if count == 1 or settings != whole:
            return state
        rows = state["rows"][index * self.batch_size : (index + 1) * self.batch_size]
        return {**state, "settings": self.settings(), "rows": rows}

    # Places -----------------------------------------------------------------------------------------------------

    def _start(self):
        first = self.shard[0] * self.batch_size
        return np.array([self._open_turn(first + row) for row in range(self.batch_size)], "int64")

    def _open_turn(self, turn):
        """Place of a row at the start of the document number `turn` of all passes; empty after the last pass."""
        if self.passes is not None and turn >= self.passes * len(self.documents):
            return turn, 0, 0, 1
        return turn, 0, self._piece_end(0, self._readable(turn)), 1

    def _piece_end(self, offset, readable):
        return readable if self._longest is None else min(readable, offset + self._longest)

    def _place_at(self, number):
        """int64 `[B, 4]` before batch `number`: each row's turn, offset, end of its piece, whether it starts here."""
        known = [at for at in list(self._places) if at <= number]
        if not known:
            raise ValueError(
                f"A dataset whose place was loaded starts at batch {min(self._places)}. Received: number={number}"
            )
        at = max(known)
        place = self._places[at]
        for step in range(at, number):
            place = self._next(place)
            self._places[step + 1] = place
        if len(self._places) > _KEPT:
            keep = {at for at in list(self._places) if at == self.position or at > number - _KEPT // 2}
            self._places = {at: place for at, place in list(self._places.items()) if at in keep}
        return place

    def _next(self, place):
        rows = self.batch_size * self.shard[1]
        place = place.copy()
        place[:, _OFFSET] = np.minimum(place[:, _OFFSET] + self.chunk_tokens, place[:, _END])
        place[:, _FRESH] = place[:, _END] == 0  # rows without a document are reset at every batch
        for row in np.flatnonzero((place[:, _OFFSET] == place[:, _END]) & (place[:, _END] > 0)):
            turn, offset = place[row, _TURN], place[row, _OFFSET]
            readable = self._readable(turn)
            if offset < readable:
                place[row] = turn, offset, self._piece_end(offset, readable), 1
            else:
                place[row] = self._open_turn(int(turn) + rows)
        return place

    # Documents --------------------------------------------------------------------------------------------------

    def _index(self, turn):
        """Index in `documents` of the document number `turn` of all passes."""
        a_pass, index = divmod(int(turn), len(self.documents))
        if not self.shuffle:
            return index
        if a_pass not in self._orders:
            if len(self._orders) > _KEPT:
                self._orders.clear()
            self._orders[a_pass] = np.random.default_rng([self.seed, a_pass]).permutation(len(self.documents))
        return int(self._orders[a_pass][index])

    def _readable(self, turn):
        """Tokens of a document that have a next token."""
        return len(self._open(self._index(turn))[0]) - 1

    def _open(self, index):
        """`(ids, weights or None)` of a document; the last few are cached."""
        found = self._opened.get(index)
        if found is None:
            document = self.documents[index]
            ids, weights = document if isinstance(document, Document) else (document, None)
            ids, weights = np.asarray(ids), None if weights is None else np.asarray(weights, "float32")
            if ids.ndim != 1 or len(ids) < 2 or (weights is not None and weights.shape != ids.shape):
                raise ValueError(
                    "A document must have at least 2 token ids [T], and weights of that shape, if any. Received: shape "
                    f"{ids.shape}{'' if weights is None else f' and {weights.shape}'} for document {index}. "
                    "Leave it out."
                )
            if len(self._opened) > 2 * self.batch_size:
                self._opened.clear()
            found = self._opened[index] = (ids, weights)
        return found

    @staticmethod
    def _check_longest(tokens):
        if tokens is not None and tokens < 1:
            raise ValueError(f"`longest` must be None or a positive integer. Received: longest={tokens}")
