"""The models and tasks of `examples.benchmarks.gpu`: what one process of it times."""

import os
from statistics import median

import numpy as np

from examples.benchmarks.measuring import seconds

SMALL_MODEL = {"vocabulary_size": 128, "num_layers": 2, "hidden_dim": 32, "num_query_heads": 2, "intermediate_dim": 64}
SMALL_MODEL |= {"block_size": 16, "memory_segments": 1, "fam_length": 4}
SYSTEMS = ("fam", "inputs", "bswa", "full")
INPUTS = {"fam_query": "layer_inputs", "memory_update": "hard_gate", "initial_fam": "summary"}  # as converted models
LOSS_PIECE = 2048  # tokens in a piece of the loss


def settings_of(args):
    """Keywords of the backbone: the paper's 1B, or a small one."""
    import keras_fam

    settings = keras_fam.model_config("paper_1b", random_state_passing=0.0, memory_update=args.memory_update)
    return settings | (SMALL_MODEL if args.small else {})


def make_model(args, training):
    """An untrained backbone; if `training`, a compiled `keras.Model` that returns mean losses."""
    import keras

    keras.utils.set_random_seed(0)
    settings = settings_of(args)
    dtype = "mixed_bfloat16" if training else "bfloat16"
    if args.system == "full":
        from examples.benchmarks.peers.full_attention import FullAttention

        names = ("vocabulary_size", "num_layers", "hidden_dim", "num_query_heads", "intermediate_dim")
        model = FullAttention(**{name: settings[name] for name in names}, remat=training, dtype=dtype)
    else:
        import keras_fam

        settings |= {"bswa": {"fam_length": 0}, "inputs": INPUTS}.get(args.system, {})
        model = keras_fam.TransformerFAMBackbone(
            **settings, remat=training, blocks_per_step=args.train_blocks if training else None, dtype=dtype
        )
    model.build()
    return model


def work_per_token(args, length, decode=False):
    """Operations per token of a forward pass: products with weights and attention, without the embedding."""
    s = settings_of(args)
    D, L, M = s["hidden_dim"], s["num_layers"], s["intermediate_dim"]
    layer = 2 * (4 * D * D + 2 * D * M)
    if args.system == "full":
        keys = length if decode else length / 2
        return L * (layer + 4 * D * keys)
    S, F = s["block_size"], 0 if args.system == "bswa" else s["fam_length"]
    keys = F + S * s["memory_segments"] + S / 2
    memory = F / S * (layer + 4 * D * (F + S))
    return L * (layer + 4 * D * keys + memory)


def matrix_throughput(small):
    """Operations per second of a large bfloat16 matrix product."""
    import keras
    from keras import ops

    from keras_fam.ops.backend import compiled

    size, products = (256, 2) if small else (8192, 20)
    a = ops.cast(keras.random.normal((size, size), seed=0), "bfloat16") * size**-0.5

    def chain(a):
        x = a
        for _ in range(products):
            x = ops.matmul(x, a)
        return x[0, :1]

    run = compiled(chain, list)
    times = [seconds(lambda: ops.convert_to_numpy(ops.cast(run(a), "float32"))) for _ in range(8)]
    return 2 * size**3 * products / median(times[3:])


def prefill(args):
    """A function of a length: a function that reads so many tokens and waits for the last hidden state."""
    from keras import ops

    from keras_fam.ops.backend import compiled

    model, vocabulary = make_model(args, training=False), settings_of(args)["vocabulary_size"]

    def last(hidden):
        return ops.cast(hidden[:, -1], "float32")

    def step(ids, state):
        hidden, state = model.advance(ids, state, aligned=True)
        return last(hidden), state

    whole = compiled(lambda ids: last(model(ids)), lambda: model.variables)
    run = compiled(step, lambda: model.variables, record="gpu")

    def at(length):
        ids = np.random.default_rng(0).integers(0, vocabulary, (1, length)).astype("int32")
        if args.system == "full":
            return lambda: ops.convert_to_numpy(whole(ops.convert_to_tensor(ids)))
        size = min(length, args.blocks_per_step * model.block_size)

        def read():
            state = model.get_initial_state(1)
            for first in range(0, length, size):
                hidden, state = run(ops.convert_to_tensor(ids[:, first : first + size]), state)
            return ops.convert_to_numpy(hidden)

        return read

    return at


def train(args):
    """A function of a length: a function that runs one train step and waits for the loss."""
    import keras
    from keras import ops

    from keras_fam.ops.backend import remat
    from keras_fam.ops.scan import scan

    model, vocabulary = make_model(args, training=True), settings_of(args)["vocabulary_size"]

    class WithLoss(keras.Model):
        """`(ids, targets)` to the mean cross-entropy, with logits for `LOSS_PIECE` tokens at a time."""

        def __init__(self):
            super().__init__(dtype=model.dtype_policy)
            self.backbone, self.built = model, True

        def call(self, inputs, training=None):
            ids, targets = inputs
            hidden, length = self.backbone(ids, training=training), ids.shape[1]
            count = max(1, length // LOSS_PIECE)

            def piece(total, x):
                # Not through the embedding layer: in a mixed model Keras computes its reverse call in float32.
                kernel = ops.cast(ops.convert_to_tensor(model.token_embedding.embeddings), x["hidden"].dtype)
                logits = ops.cast(ops.matmul(x["hidden"], ops.transpose(kernel)), "float32")
                loss = keras.losses.sparse_categorical_crossentropy(x["targets"], logits, from_logits=True)
                return total + ops.sum(loss), (total,)

            if training:
                piece = remat(piece, model.trainable_variables)
            xs = {"hidden": ops.reshape(hidden, (count, -1, hidden.shape[-1]))}
            xs["targets"] = ops.reshape(targets, (count, -1))
            zero = ops.zeros((), "float32")
            total, _ = scan(piece, zero, xs, (zero,))
            return ops.expand_dims(total / length, 0)

    whole = WithLoss()
    whole.compile("adafactor", loss=lambda y_true, y_pred: ops.mean(y_pred))

    def at(length):
        ids = np.random.default_rng(0).integers(0, vocabulary, (1, length + 1)).astype("int32")
        inputs = (ids[:, :-1], ids[:, 1:])
        return lambda: float(whole.train_on_batch(inputs, np.zeros((1,), "float32"), return_dict=True)["loss"])

    return at


def step_program(step, variables):
    """A compiled `step(ids, state)`; on JAX the new state reuses the buffers of the old one."""
    import keras

    from keras_fam.ops.backend import compiled

    if os.environ["KERAS_BACKEND"] == "torch":
        return compiled(step, lambda: variables, record="anywhere")
    import jax

    def pure(values, state, ids):
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return step(ids, state)

    program = jax.jit(pure, donate_argnums=1)
    return lambda ids, state: program([v.value for v in variables], state, ids)


def decode(args):
    """A function of a context length: a function that reads one token per row and waits for its logits."""
    import keras
    from keras import ops

    model, rows = make_model(args, training=False), args.rows
    ids = np.random.default_rng(0).integers(0, settings_of(args)["vocabulary_size"], (rows, 1)).astype("int32")
    ids = ops.convert_to_tensor(ids)

    def logits(hidden):
        return ops.cast(model.token_embedding(hidden[:, -1], reverse=True), "float32")

    def over_cache(ids, state):
        caches, position = state
        hidden, caches = model.step(ids, caches, position)
        return logits(hidden), (caches, position + 1)

    def stream(ids, state):
        hidden, state = model.advance(ids, state)
        return logits(hidden), state

    run = step_program(over_cache if args.system == "full" else stream, model.variables)

    def at(length):
        if args.system == "full":
            held = (model.get_cache(rows, length + 64 * args.repeats), ops.convert_to_tensor(np.int32(length)))
        else:  # a state has constant size, so one context represents all; this one has full segments
            held = model.get_initial_state(rows)
            full = ops.full((rows,), model.block_settings["memory_segments"], "int32")
            held = held._replace(position=held.position._replace(block_index=full))
        held = keras.tree.map_structure(ops.copy, held)  # without shared buffers

        def read():
            nonlocal held
            found, held = run(ids, held)
            return ops.convert_to_numpy(found)

        return read

    return at


TASKS = {"prefill": prefill, "train": train, "decode": decode}
