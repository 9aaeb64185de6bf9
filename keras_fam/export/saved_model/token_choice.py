"""Generation on the server: one loop of one-token steps through the model's `advance`."""

from typing import Any, NamedTuple

from keras_fam.export.saved_model.serving_functions import keep_shapes, require, tensorflow


class Options(NamedTuple):
    """How new tokens are chosen.

    Attributes:
        max_new_tokens: int32 scalar, N ≥ 0.
        temperature: float32 scalar; 0 is greedy.
        top_k: int32 scalar; 0 keeps all tokens.
        seed: int32 `[B]`; a row's draws depend on its seed and position only.
        stop_tokens: int32 `[K]`; a row ends with the first of them.
    """

    max_new_tokens: Any
    temperature: Any
    top_k: Any
    seed: Any
    stop_tokens: Any


def check_options(options, token_ids):
    """Ops that fail for options out of range."""
    tf = tensorflow()
    rows, seeds = tf.shape(token_ids)[0], tf.shape(options.seed)[0]
    count, temperature = options.max_new_tokens, options.temperature
    fits = tf.logical_and(temperature >= 0, tf.math.is_finite(temperature))
    return [
        require(count >= 0, "max_new_tokens is at least 0; received", count),
        require(fits, "temperature is a finite number of at least 0 (0 is greedy); received", temperature),
        require(options.top_k >= 0, "top_k is at least 0 (0 keeps all tokens); received", options.top_k),
        require(seeds == rows, "seed has one entry per row; rows and entries:", rows, seeds),
    ]


def generate(reader, token_ids, lengths, served, options):
    """Reads a prompt, then chooses new tokens and reads each of them.

    Args:
        reader: `Reader` of a language model.
        token_ids: int32 `[B, T]`.
        lengths: int32 `[B]`, how many of them are real; 0 for a row that continues without a prompt.
        served: `Served` of B rows.
        options: `Options`.

    Returns:
        `(tokens, counts, served)`: int32 `[B, N]`, zeros after a row's last token; int32 `[B]`, how many tokens each
        row has; the state after all of them, stop tokens included.
    """
    tf = tensorflow()
    ready = reader.position(served) + tf.cast(lengths, tf.int64) > 0
    begun = require(ready, "A row that has read no tokens needs a prompt (lengths ≥ 1); ready:", ready)
    with tf.control_dependencies([begun]):
        lengths = tf.identity(lengths)
    leaves = tf.cond(
        tf.reduce_any(lengths > 0),
        lambda: reader.flatten(reader.read(token_ids, lengths, served, every=False)[1]),
        lambda: reader.flatten(served),
    )
    count = options.max_new_tokens
    found = tf.TensorArray(tf.int32, 0, dynamic_size=True, clear_after_read=False, element_shape=[None])
    active = tf.ones_like(lengths, tf.bool)

    def body(i, found, counts, active, *leaves):
        token = tf.where(active, choose(reader, reader.pack(leaves), options), 0)
        taken = tf.cast(active, tf.int32)
        _, *after = reader.advance_token(tf.expand_dims(token, 1), taken, *leaves)
        stop = tf.reduce_any(tf.expand_dims(token, 1) == options.stop_tokens, axis=1)
        after = keep_shapes(after, leaves)
        return i + 1, found.write(i, token), counts + taken, tf.logical_and(active, ~stop), *after

    steps, found, counts, _, *leaves = tf.while_loop(
        lambda i, found, counts, active, *_: tf.logical_and(i < count, tf.reduce_any(active)),
        body,
        (tf.constant(0), found, tf.zeros_like(lengths), active, *leaves),
    )
    rows = tf.shape(lengths)[0]
    tokens = tf.cond(steps > 0, lambda: tf.transpose(found.stack()), lambda: tf.zeros([rows, 0], tf.int32))
    return tf.pad(tokens, [[0, 0], [0, count - steps]]), counts, reader.pack(leaves)


def choose(reader, served, options):
    """The next token of every row, int32 `[B]`."""
    tf = tensorflow()
    logits, size = tf.cast(served.logits, tf.float32), reader.vocabulary_size

    def best(scores):
        return tf.argmax(scores, axis=1, output_type=tf.int32)

    def cut(scores):
        least = tf.math.top_k(scores, tf.minimum(options.top_k, size)).values[:, -1:]
        return tf.where(scores < least, -float("inf"), scores)

    def drawn():  # the largest score after Gumbel noise
        scores = logits / options.temperature
        scores = tf.cond(options.top_k > 0, lambda: cut(scores), lambda: scores)
        seeds = tf.stack([tf.cast(options.seed, tf.int64), reader.position(served)], axis=1)
        noise = tf.map_fn(
            lambda seed: tf.random.stateless_uniform([size], seed, minval=1e-30, alg="philox"),
            seeds,
            fn_output_signature=tf.TensorSpec([size], tf.float32),
        )
        return best(scores - tf.math.log(-tf.math.log(noise)))

    return tf.cond(options.temperature > 0, drawn, lambda: best(logits))
