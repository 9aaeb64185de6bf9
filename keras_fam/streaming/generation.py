"""Generation: a stream chooses its next tokens with a sampler, reads them, and stays where it then stands.

A sampler that chooses tokens one by one is part of the program that reads them (`decoding.py`), many tokens at a time.
Searches run on a copy of the state; then the chosen tokens are read like any other chunk. Either way, state, position
and logits of the stream are those of `predict` on the whole text, however it came about.
"""

import contextlib

import keras
import numpy as np
from keras import ops

from keras_fam.ops.token_ids import check_ids_of
from keras_fam.streaming.decoding import decode
from keras_fam.streaming.hub_samplers import HubSamplerCall, find_hub_sampler
from keras_fam.streaming.samplers import NAMES, Sampler
from keras_fam.streaming.sampling import SamplerCall, search
from keras_fam.streaming.text import TextPieces, as_texts, detokenize, find_stop_tokens, is_one_text, tokenize


class StreamGeneration:
    """`generate` and `generate_stream` of a `StreamingModel`."""

    def generate(self, prompt=None, *, max_new_tokens, sampler="greedy", stop_token_ids=None, lengths=None, seed=None):
        """Continues every row's text. The rows read the prompt and what they chose, a stop token included, and the
        next call continues from there.

        ```python
        stream.generate([[5, 3, 8], [2]], max_new_tokens=20)                       # lists of ids
        stream.generate(max_new_tokens=20, sampler="top_k", seed=1)                # continues
        stream.generate(max_new_tokens=20, sampler=keras_fam.samplers.TopPSampler(p=0.9, temperature=0.7))
        ```

        Compiled once per power of two of `max_new_tokens` and per sampler (contrastive: per number). The cost is one
        one-token step per token for as long as some row has not stopped, all in one program (on torch: in recorded
        steps, on a GPU in CUDA graphs of several steps). Beam and contrastive search read what they chose once more.

        Args:
            prompt: None, int `[B, P]` token ids, a list of B lists of ids (empty ones read nothing), or B strings (one
                string if B = 1), where the model has a preprocessor with a tokenizer: its start token goes first in
                rows that have read nothing, if the preprocessor adds one. Arrays and tensors are accepted for both.
            max_new_tokens: how many tokens a row gets at most, a positive integer.
            sampler: a name (`"greedy"`, `"random"`, `"top_k"`, `"top_p"`), a config, or an object from
                `keras_fam.samplers`. With KerasHub installed, also `"beam"` and `"contrastive"`, and objects from
                `keras_hub.samplers`. A random sampler keeps its random state from call to call. The
                contrastive one compares with the tokens of the same call: a stream keeps no hidden states.
            stop_token_ids: None, ints at which a row ends, or `"auto"`: the tokenizer's end tokens.
            lengths: None, or int `[B]`: how many of the P tokens exist in each row.
            seed: None, or an integer from 0 to 2³² − 1 from which this call draws: the same seed, the same tokens.

        Returns:
            A list of B lists of ids, the stop token included; or of B strings (one string), if strings came in.

        Raises:
            ValueError: for arguments that do not fit, and for rows that have read nothing. After any exception, stream
                and sampler are as they were.
            ImportError: for a sampler of KerasHub, without KerasHub.
        """
        check_count("max_new_tokens", max_new_tokens)
        stops = find_stop_tokens(self.model, stop_token_ids)
        found = find_sampler(sampler)
        with self._lock, _all_or_nothing(self):
            self._refuse_while_training()
            call = start_call(found, seed, max_new_tokens)
            with _undone_on_failure(call):
                text = read_prompt(self, prompt, lengths)
                tokens, kept = continue_rows(self, max_new_tokens, call, stops)
        rows = [row[:n].tolist() for row, n in zip(tokens, kept, strict=True)]
        if text:
            rows = [detokenize(self.model, row) for row in rows]
            return rows[0] if is_one_text(prompt) else rows
        return rows

    def generate_stream(
        self,
        prompt=None,
        *,
        max_new_tokens,
        sampler="greedy",
        stop_token_ids=None,
        lengths=None,
        seed=None,
        group_size=1,
    ):
        """`generate`, token by token.

        ```python
        for tokens in stream.generate_stream([[5, 3, 8], [2]], max_new_tokens=20):   # int32 [2]
            ...
        for piece in stream.generate_stream("Once upon a time", max_new_tokens=20):   # a stream of one row
            print(piece, end="", flush=True)
        ```

        The prompt is read at once. A token that was handed out has been read by the stream, so the loop may end early
        and the stream continues from there. The same seed gives the tokens of `generate`.

        Args: those of `generate`, with a sampler that chooses tokens one by one: all but beam and contrastive search.
            group_size: how many tokens are made at a time, before they come one by one: 1 by default. A group is one
                program, which costs less per token, above all on a GPU; its first token comes with its last. While a
                group comes out, the stream stands behind it; a loop that ends early puts the stream back behind the
                last token that it was given (unless something else has moved the stream since).

        Returns:
            An iterator. If ids came in (or no prompt): of NumPy int32 `[B]`, −1 in rows that have ended. If strings
            came in: of lists of B pieces of text (of one piece, for one string), `""` in rows that have ended. Pieces
            are whole characters: a token that ends within one is held back until the next completes it, so there may
            be fewer pieces than tokens. Together they are the text that `generate` returns.

        Raises:
            ValueError, ImportError: as `generate`, at once. An exception in a later step leaves the stream where it
                stood after the step before.
        """
        check_count("max_new_tokens", max_new_tokens)
        check_count("group_size", group_size)
        stops = find_stop_tokens(self.model, stop_token_ids)
        found = find_sampler(sampler)
        with self._lock, _all_or_nothing(self):
            self._refuse_while_training()
            call = start_call(found, seed, max_new_tokens)
            with _undone_on_failure(call):
                if not call.stepwise:
                    raise ValueError(
                        f"Tokens come one by one from samplers that choose them one by one; received "
                        f"{type(found).__name__}. Use `generate`, or a greedy, random, top-k or top-p sampler."
                    )
                text = read_prompt(self, prompt, lengths)
        steps = _steps(self, max_new_tokens, call, stops, group_size)
        return _pieces(self, steps, is_one_text(prompt)) if text else steps


def _pieces(stream, steps, single):
    """Pieces of text out of tokens, whole characters at a time."""
    rows, alive = [TextPieces(stream.model) for _ in range(stream.batch_size)], [True] * stream.batch_size
    for tokens in steps:
        pieces = []
        for i, token in enumerate(tokens.tolist()):
            pieces.append(rows[i].add(token) if token >= 0 else rows[i].finish() if alive[i] else "")
            alive[i] = token >= 0
        if any(pieces):
            yield pieces[0] if single else pieces
    pieces = [row.finish() for row in rows]
    if any(pieces):
        yield pieces[0] if single else pieces


def continue_rows(stream, count, call, stops):
    """Lets a stream go on by up to `count` tokens per row.

    Returns:
        `(tokens, kept)`: NumPy int32 `[B, count]`, and int `[B]`, how many of them each row has read.
    """
    if not call.stepwise:
        tokens, kept = search(stream, count, call, stops)
        stream._read(tokens, kept, keep=False)
        return tokens, kept
    tokens, seeds, state, logits = decode(stream, count, call, stops)
    kept = (tokens >= 0).sum(axis=1)
    call.commit(seeds)
    stream._state, stream.next_logits, stream.position = state, logits, stream.position + kept
    return tokens, kept


def _steps(stream, count, call, stops, group_size):
    """The tokens `[B]` of every step, made `group_size` at a time."""
    alive = np.ones(stream.batch_size, "int32")
    for first in range(0, count, group_size):
        with stream._lock:
            stream._refuse_while_training()
            before = stream._state, stream.next_logits, stream.position
            tokens, seeds, state, logits = decode(stream, min(group_size, count - first), call, stops, alive)
            call.commit(seeds)
            position = stream.position + (tokens >= 0).sum(axis=1)
            stream._state, stream.next_logits, stream.position = state, logits, position
        tokens = tokens[:, : int((tokens >= 0).sum(axis=1).max())]  # all rows may have ended
        given = 0
        try:
            for given in range(1, tokens.shape[1] + 1):
                yield tokens[:, given - 1].copy()
        finally:
            if given < tokens.shape[1]:
                _put_back(stream, state, before, tokens[:, :given])
        alive = alive * ~np.isin(tokens, stops).any(axis=1)
        if not alive.any():
            return


def _put_back(stream, state, before, tokens):
    """Lets a stream stand behind the first tokens of a group, if it still stands behind the whole group."""
    with stream._lock:
        if stream._state is state and not stream._trains:
            stream._state, stream.next_logits, stream.position = before
            stream._read(np.maximum(tokens, 0), (tokens >= 0).sum(axis=1), keep=False)


@contextlib.contextmanager
def _all_or_nothing(stream):
    """Puts the stream back if the block raises."""
    before = stream._state, stream.next_logits, stream.position
    try:
        yield
    except BaseException:
        stream._state, stream.next_logits, stream.position = before
        raise


@contextlib.contextmanager
def _undone_on_failure(call):
    try:
        yield
    except BaseException:
        call.undo()
        raise


def find_sampler(sampler):
    """A sampler object from a name, a config or an object.

    Raises:
        ValueError: for anything else.
        ImportError: for a sampler of KerasHub, without KerasHub.
    """
    if isinstance(sampler, Sampler):
        return sampler
    if isinstance(sampler, str) and sampler in NAMES:
        return NAMES[sampler]()
    if isinstance(sampler, dict):
        if sampler.get("class_name") in NAMES:
            return NAMES[sampler["class_name"]].from_config(sampler.get("config", {}))
        found = keras.saving.deserialize_keras_object(sampler) if "registered_name" in sampler else None
        if isinstance(found, Sampler):
            return found
    return find_hub_sampler(sampler)


def start_call(sampler, seed, count):
    """The `SamplerCall` of one call that chooses at most `count` tokens."""
    kind = SamplerCall if isinstance(sampler, Sampler) else HubSamplerCall
    return kind(sampler, seed, count)


def read_prompt(stream, prompt, lengths):
    """Reads a prompt, if there is one; whether it was text."""
    if isinstance(stream.next_logits, tuple):
        raise ValueError(f"Only language models generate; received a stream of {stream.model.name}, without logits.")
    text = False
    if prompt is None:
        if lengths is not None:
            raise ValueError("`lengths` belong to a prompt; received lengths without one.")
    else:
        ids, lengths, text = _as_ids(stream, prompt, lengths)
        if ids.shape[1]:
            stream._read(ids, lengths, keep=False)
    unknown = np.flatnonzero(ops.convert_to_numpy(ops.isnan(stream.next_logits[:, 0])))
    if len(unknown):
        raise ValueError(
            f"Rows {unknown.tolist()} have nothing to go on from: nothing was read since their reset or since "
            "`set_state`, or the logits are NaN. Give a prompt of at least one token."
        )
    return text


def _as_ids(stream, prompt, lengths):
    """`(ids, lengths, text)` of a prompt: int32 `[B, P]`, None or int `[B]`, whether it came as strings."""
    rows, texts = prompt, as_texts(prompt)
    text = texts is not None
    if text:
        new = [*(stream.position == 0), *[False] * len(texts)]
        rows = [tokenize(stream.model, row, start) for row, start in zip(texts, new, strict=False)]
    if isinstance(rows, list | tuple):
        rows = [_to_numpy(row) if hasattr(row, "shape") else row for row in rows]
    ragged = isinstance(rows, list | tuple) and all(isinstance(row, list | tuple | np.ndarray) for row in rows)
    if ragged and (text or lengths is None or len({len(row) for row in rows}) > 1):
        if lengths is not None:
            raise ValueError(
                "`lengths` belong to a prompt of shape [B, P]; received them with strings or rows of several sizes."
            )
        ids, lengths = pad_rows(rows)
    else:
        ids = _to_numpy(rows)
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or ids.shape[0] != stream.batch_size:
        raise ValueError(
            "A prompt must be int [B, P], a list of B token lists, or B strings, with B the batch size of the stream, "
            f"{stream.batch_size}; received shape {ids.shape} of {ids.dtype}."
        )
    check_ids_of(stream.model, ids, None if lengths is None else np.asarray(lengths))
    return ids.astype("int32"), lengths, text


def pad_rows(rows):
    """Lists of ids as `(ids, lengths)`: `[B, P]` padded with 0 on the right, int32 `[B]`."""
    rows = [np.asarray(row) if len(row) else np.zeros(0, "int32") for row in rows]
    if any(row.ndim != 1 for row in rows) or not rows:
        return np.zeros(0), None  # no ids: refused where shapes are checked
    lengths = np.array([len(row) for row in rows], "int32")
    ids = np.zeros((len(rows), lengths.max()), np.result_type(*rows))
    for row, out in zip(rows, ids, strict=True):
        out[: len(row)] = row
    return ids, lengths


def _to_numpy(x):
    return np.asarray(ops.convert_to_numpy(x) if ops.is_tensor(x) else x)


def check_count(name, value):
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer; received {value!r}.")
