"""What the server computes: reading tokens, as functions of flat tensors. Runs on TensorFlow only.

The served state is the model's `StreamState` and, for a language model, the logits after the last token read, from
which a stream can continue generating without a prompt. Each of its rows is one stream.
"""

import re
from typing import Any, NamedTuple

import keras

from keras_fam.ops.scan import keep_branches_small
from keras_fam.state import Spec, StreamState, map_specs, named_leaves


def tensorflow():
    """The `tensorflow` module; ImportError with the remedy if it is missing."""
    try:
        import tensorflow
    except ImportError as error:
        raise ImportError(
            "Export for TF Serving writes a SavedModel, which needs TensorFlow (whatever backend the model runs on): "
            'pip install "keras-fam[tensorflow]".'
        ) from error
    return tensorflow


def require(condition, message, *seen):
    """An op that fails with InvalidArgument and the message unless all entries of `condition` are True."""
    tf = tensorflow()
    return tf.debugging.Assert(tf.reduce_all(condition), [message, *seen], summarize=16)


def after(checks, *tensors):
    """The tensors, once the checks have passed."""
    tf = tensorflow()
    with tf.control_dependencies(checks):
        return [tf.identity(x) for x in tensors]


class Served(NamedTuple):
    """State of B rows on the server.

    Attributes:
        stream: `StreamState`.
        logits: float32 `[B, V]` after each row's last token, zeros before the first; `()` for a backbone.
    """

    stream: Any
    logits: Any = ()


class Reader:
    """A model as functions from flat tensors to flat tensors.

    Args:
        model: a built `TransformerFAMCausalLM` or `TransformerFAMBackbone` on the TensorFlow backend.
        step_size: tokens that are read at a time where only the last logits are needed.

    Attributes:
        generates: whether the model has logits to choose tokens from.
        output: name of the outputs, `"logits"` or `"hidden"`.
        names: flat name of every leaf of a `Served` state, in order.
        spec: `Served` of `Spec`s, batch size None.
    """

    def __init__(self, model, step_size):
        self.model, self.step_size = model, step_size
        self.generates = hasattr(model, "backbone")
        self.output = "logits" if self.generates else "hidden"
        self.backbone = model.backbone if self.generates else model
        self.vocabulary_size = self.backbone.vocabulary_size
        # Half precision leaves the server as float32, which REST can carry; float64 stays.
        self.output_dtype = "float64" if model.compute_dtype == "float64" else "float32"
        last = Spec((None, self.vocabulary_size), self.output_dtype) if self.generates else ()
        self.spec = Served(model.state_spec(None), last)
        self.names = [flat_name(name) for name in leaf_names(self.spec.stream)]
        if self.generates:
            self.names.append("state_logits")
        # Traced once each, and shared by all signatures.
        tf = tensorflow()
        leaves = [tf.TensorSpec(spec.shape, spec.dtype) for spec in self.leaf_specs()]
        token, tokens, lengths = (tf.TensorSpec(shape, tf.int32) for shape in ((None, 1), (None, None), (None,)))
        self.advance_token = tf.function(self._advance, autograph=False, input_signature=[token, lengths, *leaves])
        self._advance_tokens = tf.function(self._advance, autograph=False, input_signature=[tokens, lengths, *leaves])
        self._advance_in_steps = tf.function(
            self._read_in_steps, autograph=False, input_signature=[tokens, lengths, *leaves]
        )

    # States -----------------------------------------------------------------------------------------------------

    def flatten(self, served):
        """`Served` to a list of tensors, in the order of `names`."""
        return [*keras.tree.flatten(served.stream), *([served.logits] if self.generates else [])]

    def pack(self, leaves):
        """The inverse of `flatten`."""
        leaves = list(leaves)
        logits = leaves.pop() if self.generates else ()
        return Served(pack_like(self.spec.stream, leaves), logits)

    def leaf_specs(self):
        """`Spec`s in the order of `names`."""
        found = []
        map_specs(found.append, self.spec)
        return found

    def initial(self, batch_size):
        """The initial `Served` state of `batch_size` (an int32 scalar) rows."""
        tf = tensorflow()
        stream = self.model.get_initial_state(1)
        rows = [tf.repeat(leaf, batch_size, axis=0) for leaf in keras.tree.flatten(stream)]
        logits = tf.zeros([batch_size, self.vocabulary_size], self.output_dtype) if self.generates else ()
        return Served(pack_like(self.spec.stream, rows), logits)

    def position(self, served):
        """int64 `[B]`, tokens read by each row."""
        tf = tensorflow()
        position = served.stream.position
        return tf.cast(position.block_index, tf.int64) * self.backbone.block_size + tf.cast(position.offset, tf.int64)

    # Checks -----------------------------------------------------------------------------------------------------

    def check_tokens(self, token_ids, lengths):
        """Ops that fail for invalid ids or lengths; ids past a row's length may be anything."""
        tf = tensorflow()
        rows, total = tf.shape(token_ids)[0], tf.shape(token_ids)[1]
        given = tf.shape(lengths)[0]
        checks = [
            require(
                total >= 1, "token_ids [B, T] need at least one column (T ≥ 1); received shape", tf.shape(token_ids)
            ),
            require(given == rows, "lengths have one entry per row of token_ids; rows and entries:", rows, given),
        ]
        with tf.control_dependencies(checks):
            fits = tf.logical_and(lengths >= 0, lengths <= total)
            real = tf.range(total) < tf.expand_dims(lengths, 1)
            known = tf.logical_and(token_ids >= 0, token_ids < self.vocabulary_size)
        return [
            *checks,
            require(fits, "lengths are integers from 0 to T; T and lengths:", total, lengths),
            require(
                tf.logical_or(known, ~real),
                f"token_ids are integers from 0 to {self.vocabulary_size - 1}; received",
                tf.boolean_mask(token_ids, tf.logical_and(real, ~known)),
            ),
        ]

    def check_rows(self, served, token_ids):
        """Ops that fail unless every leaf has the rows of `token_ids`."""
        tf = tensorflow()
        rows = tf.shape(token_ids)[0]
        leaves = zip(self.names, self.flatten(served), strict=True)
        return [
            require(tf.shape(x)[0] == rows, f"{name} has one row per row of token_ids; rows:", tf.shape(x)[0], rows)
            for name, x in leaves
        ]

    def check_padding(self, token_ids, padding_mask):
        """As `check_tokens`, for a mask that is True at real tokens."""
        tf = tensorflow()
        shape, given = tf.shape(token_ids), tf.shape(padding_mask)
        same = require(shape == given, "padding_mask has the shape of token_ids; shapes:", given, shape)
        with tf.control_dependencies([same]):
            real = tf.where(padding_mask, token_ids, 0)
        return [same, *self.check_tokens(real, tf.fill(shape[:1], shape[1]))]

    def check_batch_size(self, batch_size):
        return [require(batch_size >= 0, "batch_size is at least 0; received", batch_size)]

    # Reading ----------------------------------------------------------------------------------------------------

    def whole(self, token_ids, padding_mask=None):
        """Outputs `[B, T, …]` of whole sequences."""
        tf = tensorflow()

        def empty():
            return tf.zeros([0, tf.shape(token_ids)[1], self.model.output_width], self.output_dtype)

        def outputs():
            return tf.cast(self.model(token_ids, padding_mask=padding_mask, training=False), self.output_dtype)

        return tf.cond(tf.shape(token_ids)[0] == 0, empty, outputs)

    def read(self, token_ids, lengths, served, *, every=True):
        """Reads the next tokens.

        Args:
            token_ids: int32 `[B, T]`, T ≥ 1 known at run time only.
            lengths: int32 `[B]`, how many of them are real.
            served: `Served` of B rows.
            every: whether outputs of all tokens are returned.

        Returns:
            `(outputs, served)`: `[B, T, …]`, zeros past each row's length, or None unless `every`; the next state.
        """
        tf = tensorflow()
        total = tf.shape(token_ids)[1]
        token_ids = tf.where(tf.range(total) < tf.expand_dims(lengths, 1), token_ids, 0)

        def nothing():  # a call without rows
            width = self.model.output_width
            empty = tf.zeros([0, total, width], self.output_dtype)
            return ([empty] if every else []) + self.flatten(served)

        def token():  # a program with T = 1 does not compute a whole block
            outputs, *after = self.advance_token(token_ids[:, :1], lengths, *self.flatten(served))
            return ([outputs] if every else []) + after

        def tokens():
            if every:
                return list(self._advance_tokens(token_ids, lengths, *self.flatten(served)))
            return list(self._advance_in_steps(token_ids, lengths, *self.flatten(served)))

        results = tf.cond(tf.shape(token_ids)[0] == 0, nothing, lambda: tf.cond(total == 1, token, tokens))
        outputs = results.pop(0) if every else None
        return outputs, self.pack(results)

    def _advance(self, token_ids, lengths, *leaves):
        """One call of the model: `(outputs, *leaves)`."""
        tf = tensorflow()
        served = self.pack(leaves)
        with keep_branches_small():
            outputs, stream = self.model.advance(token_ids, served.stream, lengths=lengths)
        outputs = tf.cast(outputs, self.output_dtype)
        last = ()
        if self.generates:
            last = tf.gather(outputs, tf.maximum(lengths - 1, 0), batch_dims=1)
            last = chosen(lengths > 0, last, served.logits)
        return outputs, *self.flatten(Served(stream, last))

    def _read_in_steps(self, token_ids, lengths, *leaves):
        """A long prompt in constant memory: hidden states of one step, logits of the last token only."""
        tf = tensorflow()
        total, size = tf.shape(token_ids)[1], self.step_size

        def body(first, *leaves):
            served = self.pack(leaves)
            taken = tf.clip_by_value(lengths - first, 0, size)
            hidden, stream = self.backbone.advance(token_ids[:, first : first + size], served.stream, lengths=taken)
            last = ()
            if self.generates:
                hidden = tf.gather(hidden, tf.maximum(taken - 1, 0), batch_dims=1)
                last = self.backbone.token_embedding(hidden[:, None], reverse=True)[:, 0]
                last = chosen(taken > 0, tf.cast(last, self.output_dtype), served.logits)
            return first + size, *keep_shapes(self.flatten(Served(stream, last)), leaves)

        return tf.while_loop(lambda first, *_: first < total, body, (tf.constant(0), *leaves))[1:]


def flat_name(name):
    """`"layers[1].value"` as `"state_layers_1_value"`."""
    return "state_" + re.sub(r"\W+", "_", name).strip("_")


def leaf_names(spec):
    """Names of a state's leaves from its spec: there, a leaf is a `Spec`."""
    marked = map_specs(lambda s: [s], spec)  # a list is a leaf to `named_leaves`
    return [name for name, _ in named_leaves(marked)]


def pack_like(spec, leaves):
    """The `StreamState` with the structure of `spec` and these tensors."""
    leaves = iter(leaves)
    state = map_specs(lambda _: next(leaves), spec)
    return StreamState(*state)


def chosen(mask, new, old):
    """Rows of `new` where `mask` `[B]` holds, else of `old`."""
    tf = tensorflow()
    return tf.where(tf.reshape(mask, [-1] + [1] * (len(new.shape) - 1)), new, old)


def keep_shapes(new, old):
    """Tensors of a loop's body, with the static shapes that they had on entry."""
    tf = tensorflow()
    return [tf.ensure_shape(a, b.shape) for a, b in zip(new, old, strict=True)]
