"""Generation: a stream chooses its next tokens with a KerasHub sampler, reads them, and stays where it then stands.

Tokens are sampled on a copy of the state, in one compiled loop; then the chosen ones are read like any other chunk. On
torch, where nothing is gained by one loop, a stream reads each token when it is chosen, if the sampler permits. Either
way, state, position and logits of the stream are those of `predict` on the whole text, however it came about.
"""

import contextlib

import numpy as np
from keras import ops

from keras_fam.ops.backend import runs_eagerly, small_step
from keras_fam.streaming.sampling import choose, chooses_one_by_one, copied, find_sampler, program


def generate(stream, prompt=None, *, max_new_tokens, sampler="greedy", stop_token_ids=None, lengths=None, seed=None):
    """Goes on with every row's text. The rows read the prompt and what they chose, a stop token included, and the next
    call goes on from there.

    ```python
    stream.generate([[5, 3, 8], [2]], max_new_tokens=20)                          # lists of ids
    stream.generate(max_new_tokens=20, sampler=keras_hub.samplers.TopKSampler(5))  # on and on
    ```

    Compiled once per power of two of `max_new_tokens` and per sampler (contrastive: per number); costs one one-token
    step per token for as long as some row has not stopped, and (but on torch with a sampler that chooses one token at a
    time) reading the chosen tokens once more, as a chunk.

    Args:
        stream: `StreamingModel` of a language model.
        prompt: None, int `[B, P]` token ids, a list of B lists of ids (empty ones read nothing), or B strings (one
            string if B = 1), where the model has a preprocessor with a tokenizer: its start token goes first in rows
            that have read nothing, if the preprocessor adds one.
        max_new_tokens: how many tokens a row gets at most, ≥ 1.
        sampler: a name (`"greedy"`, `"top_k"`, `"top_p"`, `"random"`, `"beam"`, `"contrastive"`), a config, or an
            object from `keras_hub.samplers`. A random sampler goes on drawing from call to call. The contrastive one
            compares with the tokens of the same call: a stream keeps no hidden states.
        stop_token_ids: None, ints at which a row ends, or `"auto"`: the tokenizer's end tokens.
        lengths: None, or int `[B]`: how many of the P tokens exist in each row.
        seed: None, or a whole number from which the sampler draws in this call: the same seed, the same tokens.

    Returns:
        A list of B lists of ids, the stop token included; or of B strings (one string), if strings came in.

    Raises:
        ValueError: for arguments that do not fit, and for rows that have read nothing. After any exception, streams
            and sampler are as they were.
        ImportError: without KerasHub.
    """
    check_count("max_new_tokens", max_new_tokens)
    stops = find_stop_tokens(stream.model, stop_token_ids)
    found = find_sampler(sampler, None)
    with _all_or_nothing(stream, found):
        found = find_sampler(found, seed)
        text = read_prompt(stream, prompt, lengths)
        if runs_eagerly() and chooses_one_by_one(found):
            tokens = np.stack(list(_steps(stream, max_new_tokens, found, stops)), axis=1)
            kept = (tokens >= 0).sum(axis=1)
        else:
            tokens, kept = choose(stream, max_new_tokens, found, stops)
            stream._read(tokens, kept, keep=False)
    rows = [row[:n].tolist() for row, n in zip(tokens, kept, strict=True)]
    if text:
        rows = [detokenize(stream.model, row) for row in rows]
        return rows[0] if isinstance(prompt, str) else rows
    return rows


def generate_stream(
    stream, prompt=None, *, max_new_tokens, sampler="greedy", stop_token_ids=None, lengths=None, seed=None
):
    """`generate` token by token: an iterator of NumPy int32 `[B]`, −1 in rows that have ended.

    The prompt is read at once. A token that was handed out has been read by the stream, so the loop may end early and
    the stream goes on from there.

    Args: those of `generate`, with a sampler that chooses tokens one by one: greedy, random, top-k or top-p.

    Raises:
        ValueError, ImportError: as `generate`, at once. An exception in a later step leaves the stream where it stood
            after the step before.
    """
    check_count("max_new_tokens", max_new_tokens)
    stops = find_stop_tokens(stream.model, stop_token_ids)
    found = find_sampler(sampler, None, stepwise=True)
    with _all_or_nothing(stream, found):
        found = find_sampler(found, seed)
        read_prompt(stream, prompt, lengths)
    return _steps(stream, max_new_tokens, found, stops)


def _steps(stream, count, sampler, stops):
    model = stream.model
    read = small_step(
        model, "one token of some rows", lambda ids, state, alive: model.advance(ids, state, lengths=alive)
    )

    def make(sampler):
        def step(state, logits, alive):
            token = ops.cast(sampler.get_next_token(sampler.compute_probabilities(logits)), "int32")
            outputs, state = read(ops.expand_dims(token, 1), state, alive)
            going = alive > 0
            after = ops.where(ops.expand_dims(going, 1), ops.cast(outputs[:, 0], logits.dtype), logits)
            return ops.where(going, token, -1), state, after

        return step

    alive = np.ones(stream.batch_size, "int32")
    for _ in range(count):
        with program(stream, ("step",), sampler, make) as run:
            token, state, logits = run(stream.state, stream.next_logits, ops.convert_to_tensor(alive))
            token = copied(token)
        stream._state, stream.next_logits, stream.position = state, logits, stream.position + alive
        alive = alive * ~np.isin(token, stops)
        yield token
        if not alive.any():
            return


@contextlib.contextmanager
def _all_or_nothing(stream, sampler):
    """Puts the stream and the sampler's seeds back if the block raises."""
    held = stream._state, stream.next_logits, stream.position
    seeds = [copied(v.value) for v in sampler.variables]
    try:
        yield
    except BaseException:
        stream._state, stream.next_logits, stream.position = held
        for variable, seed in zip(sampler.variables, seeds, strict=True):
            variable.assign(seed)
        raise


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
            f"Rows {unknown.tolist()} have nothing to go on from: nothing was read since their start or since "
            "`set_state`, or the logits are NaN. Give a prompt of at least one token."
        )
    return text


def _as_ids(stream, prompt, lengths):
    """`(ids, lengths, text)` of a prompt: int32 `[B, P]`, None or int `[B]`, whether it came as strings."""
    rows = [prompt] if isinstance(prompt, str) else prompt
    text = isinstance(rows, list | tuple) and bool(rows) and all(isinstance(row, str) for row in rows)
    if text:
        new = [*(stream.position == 0), *[False] * len(rows)]
        rows = [tokenize(stream.model, row, start) for row, start in zip(rows, new, strict=False)]
    ragged = isinstance(rows, list | tuple) and all(isinstance(row, list | tuple | np.ndarray) for row in rows)
    if ragged and (text or lengths is None or len({len(row) for row in rows}) > 1):
        if lengths is not None:
            raise ValueError(
                "`lengths` belong to a prompt of shape [B, P]; received them with strings or rows of several sizes."
            )
        ids, lengths = pad_rows(rows)
    else:
        ids = np.asarray(ops.convert_to_numpy(rows) if ops.is_tensor(rows) else rows)
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or ids.shape[0] != stream.batch_size:
        raise ValueError(
            "A prompt is int [B, P], a list of B token lists, or B strings, with B the batch size of the stream, "
            f"{stream.batch_size}; received shape {ids.shape} of {ids.dtype}."
        )
    size = stream.model.output_width
    real = ids
    if lengths is not None and np.shape(lengths) == ids.shape[:1]:  # other lengths are refused where they are read
        real = ids[np.arange(ids.shape[1]) < np.asarray(lengths)[:, None]]
    if real.size and (real.min() < 0 or real.max() >= size):
        raise ValueError(f"Token ids go from 0 to {size - 1}; received {real.min()} to {real.max()}.")
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


def check_count(name, value):
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` is a whole number of at least 1; received {value!r}.")


# Text ---------------------------------------------------------------------------------------------------------------


def find_tokenizer(model):
    tokenizer = getattr(getattr(model, "preprocessor", None), "tokenizer", None)
    if tokenizer is None:
        raise ValueError(
            f"{model.name} has no preprocessor with a tokenizer, which text and stop_token_ids='auto' need: pass token "
            "ids (and None or ids as `stop_token_ids`), or give the model a `preprocessor`."
        )
    return tokenizer


def tokenize(model, text, start=False):
    """A string as a list of ids; with `start`, behind the start token, if the preprocessor adds one."""
    tokenizer = find_tokenizer(model)
    ids = np.asarray(tokenizer(text)).reshape(-1).tolist()
    first = getattr(tokenizer, "start_token_id", None)  # None: there is none, whatever the preprocessor says
    adds = start and first is not None and getattr(model.preprocessor, "add_start_token", False)
    return [first, *ids] if adds else ids


def detokenize(model, ids):
    """A list of ids as a string, without the tokenizer's special tokens."""
    tokenizer = find_tokenizer(model)
    special = set(getattr(tokenizer, "special_token_ids", []))
    text = tokenizer.detokenize([i for i in ids if i not in special])
    text = text.numpy() if hasattr(text, "numpy") else text
    return text.decode(errors="replace") if isinstance(text, bytes) else str(text)


def find_stop_tokens(model, stop_token_ids):
    """Stop tokens as a tuple of ints, from None, ints, or `"auto"`."""
    if stop_token_ids is None:
        return ()
    if isinstance(stop_token_ids, str) and stop_token_ids == "auto":
        tokenizer = find_tokenizer(model)
        found = (getattr(tokenizer, name, None) for name in ("end_token_id", "end_token2_id"))
        return tuple(int(i) for i in found if i is not None)
    ids = np.asarray(stop_token_ids).reshape(-1)
    if ids.size and (ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= model.output_width):
        raise ValueError(
            f"`stop_token_ids` are token ids from 0 to {model.output_width - 1}, None or 'auto'; received "
            f"{stop_token_ids!r}."
        )
    return tuple(sorted(set(ids.tolist())))
