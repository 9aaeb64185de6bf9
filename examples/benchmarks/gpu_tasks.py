"""The models and tasks of `examples.benchmarks.gpu`: what one process of it times."""

import os
from statistics import median

import numpy as np

from examples.benchmarks.measuring import seconds

SMALL_MODEL = {"vocabulary_size": 128, "num_layers": 2, "hidden_dim": 32, "num_query_heads": 2, "intermediate_dim": 64}
SMALL_MODEL |= {"block_size": 16, "memory_segments": 1, "fam_length": 4}
SYSTEMS = ("fam", "inputs", "masked", "bswa", "full", "mistral")
INPUTS = {"fam_query": "layer_inputs", "memory_update": "hard_gate", "initial_fam": "summary"}  # as converted models
WARMUP_CALLS = 8  # of torch before it records, see `keras_fam.ops.torch_graph`
LOSS_PIECE = 2048  # tokens in a piece of the loss


def masked(settings):
    """A window that hides nothing: the same outputs, by kernels that read a mask."""
    return {"attention_window": settings["block_size"] * (settings["memory_segments"] + 1)}


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

        settings |= {"bswa": {"fam_length": 0}, "inputs": INPUTS, "masked": masked(settings)}.get(args.system, {})
        model = keras_fam.TransformerFAMBackbone(
            **settings, remat=training, blocks_per_step=args.train_blocks if training else None, dtype=dtype
        )
    model.build()
    return model


class Run:
    """What is timed: a function without arguments, how often it is called before, and what it reads.

    Attributes:
        calls_before: calls until its programs are compiled, traced and captured.
        weight_bytes: bytes of the weights that a token needs.
    """

    def __init__(self, call, calls_before=1, weight_bytes=None):
        self.call, self.calls_before, self.weight_bytes = call, calls_before, weight_bytes

    def __call__(self):
        return self.call()


def on_torch():
    return os.environ["KERAS_BACKEND"] == "torch"


def weight_bytes(model):
    return sum(v.value.nbytes for v in model.variables)


def work_per_token(args, length):
    """Operations per token of a forward pass: products with weights and attention, without the embedding."""
    s = settings_of(args)
    D, L, M = s["hidden_dim"], s["num_layers"], s["intermediate_dim"]
    layer = 2 * (4 * D * D + 2 * D * M)
    if args.system == "full":
        return L * (layer + 4 * D * length / 2)
    S, F = s["block_size"], 0 if args.system in ("bswa", "mistral") else s["fam_length"]
    if args.system == "mistral":  # a gated feed-forward part of two thirds the width: as many weights
        return L * (layer + 4 * D * min(length / 2, S * (s["memory_segments"] + 1)))
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


def bandwidth(small):
    """Bytes per second of reading a large array."""
    from keras import ops

    from keras_fam.ops.backend import compiled

    x = ops.ones(((1 << 20) if small else (1 << 31),), "bfloat16")
    run = compiled(lambda x: ops.max(x), list)
    times = [seconds(lambda: ops.convert_to_numpy(ops.cast(run(x), "float32"))) for _ in range(8)]
    return 2 * x.shape[0] / median(times[3:])


def kernel_difference():
    """Attention without masks against attention with them, on this device: the largest difference of hidden states and
    of a gradient, relative to the largest number of each."""
    import keras
    from keras import ops

    import keras_fam
    from keras_fam.ops.backend import compiled, value_and_gradient

    settings = {**SMALL_MODEL, "hidden_dim": 128, "block_size": 64, "attention_sinks": 2, "fam_gate": -0.5}
    ids = np.random.default_rng(0).integers(0, settings["vocabulary_size"], (2, 5 * settings["block_size"]))
    found = []
    for changes in ({}, masked(settings)):
        keras.utils.set_random_seed(0)
        model = keras_fam.TransformerFAMBackbone(**settings, **changes, dtype="bfloat16")
        model.build()
        weight = model.blocks[0].attention.query.kernel

        def loss(value, model=model, weight=weight):
            with keras.StatelessScope(state_mapping=[(weight, value)]):
                return ops.sum(ops.square(ops.cast(model(ids), "float32")))

        def both(value, model=model, loss=loss):
            return model(ids), value_and_gradient(loss, value)[1]

        run = both if on_torch() else compiled(both, lambda model=model: model.variables)
        outputs = run(ops.convert_to_tensor(weight.value))
        found.append([ops.convert_to_numpy(ops.cast(x, "float32")) for x in outputs])
    pairs = zip(*found, strict=True)
    return [float(np.abs(ours - theirs).max() / np.abs(theirs).max()) for ours, theirs in pairs]


def prefill(args):
    """A function of a length: a `Run` that reads so many tokens a row and waits for the last hidden state."""
    if args.system == "mistral":
        return mistral(args, "prefill")
    from keras import ops

    from keras_fam.ops.backend import compiled

    model, vocabulary = make_model(args, training=False), settings_of(args)["vocabulary_size"]

    def last(hidden):
        return ops.cast(hidden[:, -1], "float32")

    def step(ids, state):
        hidden, state = model.advance(ids, state, aligned=True)
        return last(hidden), state

    whole = compiled(lambda ids: last(model(ids)), lambda: model.variables)
    run = compiled(step, lambda: model.variables, record="anywhere")
    first_state = (
        None if args.system == "full" else compiled(lambda: model.get_initial_state(args.rows), lambda: model.variables)
    )

    def at(length):
        ids = np.random.default_rng(0).integers(0, vocabulary, (args.rows, length)).astype("int32")
        if args.system == "full":
            return Run(lambda: ops.convert_to_numpy(whole(ops.convert_to_tensor(ids))))
        size = min(length, args.blocks_per_step * model.block_size)

        def read():
            state = first_state()
            for first in range(0, length, size):
                hidden, state = run(ops.convert_to_tensor(ids[:, first : first + size]), state)
            return ops.convert_to_numpy(hidden)

        return Run(read, 1 + -(-WARMUP_CALLS * size // length) if on_torch() else 1)

    return at


def train(args):
    """A function of a length: a `Run` of one train step that waits for the loss."""
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
        return Run(lambda: float(whole.train_on_batch(inputs, np.zeros((1,), "float32"), return_dict=True)["loss"]))

    return at


def decode(args):
    """A function of a context length: a `Run` that decodes `args.new` tokens a row and fetches them."""
    return {"full": decode_full, "mistral": lambda args: mistral(args, "decode")}.get(args.system, decode_stream)(args)


def decode_stream(args):
    import keras
    from keras import ops

    import keras_fam

    keras.utils.set_random_seed(0)
    model = keras_fam.TransformerFAMCausalLM(make_model(args, training=False))
    model.build()
    settings = model.backbone.block_settings

    def at(length):
        stream = keras_fam.StreamingModel(model, args.rows)
        state = model.get_initial_state(args.rows)  # a state has constant size: its keys may be zeros
        blocks = ops.full((args.rows,), max(settings["memory_segments"], length // model.block_size), "int32")
        state = state._replace(position=state.position._replace(block_index=blocks))
        stream.set_state(state, next_logits=ops.zeros((args.rows, model.output_width)))
        calls = 2 + -(-WARMUP_CALLS // args.new) if on_torch() else 1
        return Run(lambda: stream.generate(max_new_tokens=args.new), calls, weight_bytes(model))

    return at


def decode_full(args):
    """One program of all tokens on JAX, its caches reused; on torch one recorded graph a token."""
    import keras
    from keras import ops

    from keras_fam.ops.backend import compiled

    model = make_model(args, training=False)

    def step(ids, caches, position):
        hidden, caches = model.step(ids, caches, position)
        logits = model.token_embedding(hidden[:, -1:], reverse=True)
        return ops.cast(ops.argmax(logits, axis=-1), "int32"), caches, position + 1

    def many(values, ids, caches, position):
        with keras.StatelessScope(state_mapping=list(zip(model.variables, values, strict=True))):
            return ops.fori_loop(0, args.new, lambda i, carry: step(*carry), (ids, caches, position))

    def program():
        if on_torch():
            run = compiled(step, lambda: model.variables, record="anywhere")

            def decoded(*carry):
                for _ in range(args.new):
                    carry = run(*carry)
                return carry

            return decoded
        import jax

        run = jax.jit(many, donate_argnums=2)
        return lambda *carry: run([v.value for v in model.variables], *carry)

    run = program()

    def at(length):
        ids = ops.zeros((args.rows, 1), "int32")
        held = (ids, model.get_cache(args.rows, length + args.new), ops.convert_to_tensor(np.int32(length)))
        held = keras.tree.map_structure(ops.copy, held)  # without shared buffers

        def read():
            nonlocal held
            held = (held[0], held[1], ops.convert_to_tensor(np.int32(length)))
            held = run(*held)
            return ops.convert_to_numpy(held[0])

        return Run(read, 2 if on_torch() else 1, weight_bytes(model))

    return at


def mistral(args, task):
    """Hugging Face's Mistral, run as its users do, eagerly: a sliding window of (m+1)·S keys and its own cache."""
    import torch
    from transformers import DynamicCache, MistralConfig, MistralForCausalLM

    s = settings_of(args)
    device, window = ("cuda" if torch.cuda.is_available() else "cpu"), s["block_size"] * (s["memory_segments"] + 1)
    config = MistralConfig(
        vocab_size=s["vocabulary_size"],
        hidden_size=s["hidden_dim"],
        num_hidden_layers=s["num_layers"],
        num_attention_heads=s["num_query_heads"],
        num_key_value_heads=s["num_query_heads"],
        intermediate_size=2 * s["intermediate_dim"] // 3,
        sliding_window=window,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        attn_implementation="sdpa",
    )
    with torch.device(device):
        model = MistralForCausalLM(config).eval().to(torch.bfloat16)
    size = sum(p.nbytes for p in model.parameters())

    def at(length):
        length = min(length, 2 * window) if task == "decode" else length  # its cache holds one window
        ids = torch.randint(0, s["vocabulary_size"], (args.rows, length), device=device)
        held = {}

        @torch.no_grad()
        def read():
            held["cache"] = DynamicCache(config=config)
            for first in range(0, length, window):
                piece = ids[:, first : first + window]
                out = model(piece, past_key_values=held["cache"], use_cache=True, logits_to_keep=1)
            held["next"] = out.logits[:, -1:].argmax(-1)
            return held["next"].cpu()

        @torch.no_grad()
        def go_on():
            for _ in range(args.new):
                out = model(held["next"], past_key_values=held["cache"], use_cache=True)
                held["next"] = out.logits[:, -1:].argmax(-1)
            return held["next"].cpu()

        if task == "prefill":
            return Run(read, 2)
        read()
        return Run(go_on, 2, size)

    return at


TASKS = {"prefill": prefill, "train": train, "decode": decode}
