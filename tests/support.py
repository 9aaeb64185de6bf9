"""Shared by the tests: small settings, weights of the NumPy oracle in Keras layers, and one table of tolerances."""

import contextlib

import keras
import numpy as np
import pytest
import reference
from keras import ops

import keras_fam
from keras_fam.ops.backend import compiled

# For tests in which no backend computes anything: they run once, on the worker that is done first.
on_one_backend = pytest.mark.skipif(keras.backend.backend() != "torch", reason="no backend takes part: runs on torch")

# One table for the whole suite: relative error against the oracle, and between two ways of computing the same.
ORACLE = {"float32": 1e-5, "float64": 1e-10}
SPLIT = 1e-5
SPLIT_FLOAT64 = 1e-12
SPLIT_GRADIENT = 1e-4
# int8 rounds activations: where the last bit decides, one of them moves by a step of 254.
INT8 = 2e-2

SMALL = {"num_query_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "intermediate_dim": 24, "block_size": 4,
         "memory_segments": 1, "fam_length": 3}  # fmt: skip
HIDDEN_DIM = 12
TINY_VOCABULARY = 11
# What the oracle calls a memory update, where that is no name of the package.
UPDATES = {"learned_average": keras_fam.Average(0.3, learned=True, name="memory_update")}

# Every system of the paper and every setting of the layer, by name.
VARIANTS = {
    "fam": {},
    "fam_m0": {"memory_segments": 0},
    "fam_m3": {"memory_segments": 3},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "bswa_m0": {"fam_length": 0, "memory_segments": 0},
    "bswa_m1": {"fam_length": 0},
    "bswa_m2": {"fam_length": 0, "memory_segments": 2},
    "bswa_m1_sg": {"fam_length": 0, "stop_memory_gradient": True},
    "fam_sg": {"stop_memory_gradient": True},
    "sliding_window": {"fam_length": 0, "memory_segments": 2, "attention_window": 6},
    "transformer_xl": {"fam_length": 0, "memory_segments": 1, "attention_window": 4},
    "fam_window": {"memory_segments": 2, "attention_window": 5},
    "wide_window": {"memory_segments": 1, "attention_window": 7},
    "sinks": {"attention_sinks": 2},
    "sinks_m0": {"attention_sinks": 1, "memory_segments": 0, "num_visible_memories": 2},
    "sinks_bswa": {"attention_sinks": 4, "fam_length": 0},
    "sinks_summary": {"attention_sinks": 2, "initial_fam": "summary"},
    "sinks_static": {"attention_sinks": 2, "fam_query": "static"},
    "memories_2": {"num_visible_memories": 2},
    "memories_6": {"num_visible_memories": 6, "memory_segments": 0},
    "sum_fam": {"fam_query": "static"},
    "prefix": {"initial_fam": "prefix"},
    "summary": {"initial_fam": "summary"},
    "summary_memories_3": {"initial_fam": "summary", "num_visible_memories": 3},
    "summary_static": {"initial_fam": "summary", "fam_query": "static"},
    "summary_current": {"initial_fam": "summary", "fam_query_position": "current"},
    "float": {"fam_position": "float"},
    "float_current": {"fam_position": "float", "fam_query_position": "current"},
    "static_memories_2": {"fam_query": "static", "num_visible_memories": 2},
    "current": {"fam_query_position": "current"},
    "normalized": {"memory_update": "normalized"},
    "hard_gate": {"memory_update": "hard_gate", "num_visible_memories": 2, "fam_gate": 0.5},
    "anchored_hard_gate": {"fam_query": "anchored", "memory_update": "hard_gate", "attention_sinks": 2,
                           "fam_gate": -1.0},
    "anchored_average": {"fam_query": "anchored", "initial_fam": "summary", "memory_update": "learned_average",
                         "fam_gate": -1.0, "attention_softcap": 2.0},
    "softcap": {"attention_softcap": 2.0, "attention_scale": 0.7},
    "query_key_norm": {"query_key_norm": "rms_norm", "query_key_norm_epsilon": 1e-5},
    "post_norm": {"use_post_norm": True},
    "layer_norm_biases": {"norm": "layer_norm", "use_attention_bias": True, "use_output_bias": True,
                          "use_feedforward_bias": True, "gated": False},
    "gelu": {"activation": "gelu"},
    "experts": {"feed_forward": {"num_experts": 5, "intermediate_dim": 6, "top_k": 3, "normalize": False,
                "shared_intermediate_dim": 7}, "fam_query": "anchored"},
    "no_rope": {"rope_wavelength": None},
    "linear_rope": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3_rope": {"rope_wavelength": 5e5, "rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
    "gpt_neox": {"parallel_residual": True, "head_dim": 6, "rotary_dim": 4, "norm": "layer_norm", "gated": False,
                 "num_visible_memories": 2, "attention_sinks": 2},
    "gpt_oss": {"softmax_sink": True, "fam_gate": -1.0, "attention_sinks": 2, "initial_fam": "summary", "head_dim": 8,
                "rope_wavelength": 150.0, "rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 8.0,
                "original_max_position_embeddings": 64, "beta_slow": 1.0, "truncate": False},
                "feed_forward": {"num_experts": 3, "intermediate_dim": 6, "swiglu_limit": 0.7, "use_bias": True}},
}  # fmt: skip


@contextlib.contextmanager
def float64():
    """Lets all three backends compute in float64 inside the block.

    JAX needs a switch. And Keras narrows float64 to float32 in its own type promotion on JAX and torch (norms, means),
    by one entry of a table: for these tests the entry is the identity, as it is on TensorFlow.
    """
    table = keras.src.backend.common.dtypes.BIT64_TO_BIT32_DTYPE
    before = table["float64"]
    table["float64"] = "float64"
    try:
        if keras.backend.backend() == "jax":
            import jax.experimental

            enable = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64  # before JAX 0.8
            with enable(True):
                yield
        else:
            yield
    finally:
        table["float64"] = before


def make(variant=None, dtype="float32", seed=0, hidden_dim=HIDDEN_DIM, **settings):
    """A `TransformerFAMBlock` with the oracle's random weights: `(block, weights, cfg, fam0)`; `fam0` `[F, D]`."""
    settings = {**SMALL, **(VARIANTS[variant] if variant else {}), **settings}
    cfg = reference.settings(**settings)
    rng = np.random.default_rng(seed)
    weights = reference.random_weights(cfg, hidden_dim, rng)
    weights.pop("initial_fam", None)
    fam0 = rng.normal(size=(cfg["fam_length"], hidden_dim)) if cfg["fam_length"] else None
    if static := settings.get("fam_query") == "static":
        settings.pop("fam_query")
    settings["memory_update"] = UPDATES.get(cfg["memory_update"], cfg["memory_update"])
    if cfg["feed_forward"]:
        settings["feed_forward"] = keras_fam.MixtureOfExperts(**cfg["feed_forward"], dtype=dtype)
    block_class = keras_fam.baselines.SummaryFAMBlock if static else keras_fam.TransformerFAMBlock
    block = block_class(**settings, dtype=dtype)
    block.build((None, None, hidden_dim))
    set_weights(block, weights, fam0)
    return block, weights, cfg, fam0


def tiny(num_layers=1, seed=0, backbone_class=None, **changes):
    """A small language model (blocks of 4 tokens) with embeddings large enough that memories differ."""
    backbone_class = backbone_class or keras_fam.TransformerFAMBackbone
    keras.utils.set_random_seed(seed)
    settings = {"block_size": 4, "memory_segments": 1, "fam_length": 3, **changes}
    backbone = backbone_class(TINY_VOCABULARY, num_layers, 8, 2, 12, **settings)
    lm = keras_fam.TransformerFAMCausalLM(backbone)
    lm.build()
    table = np.random.default_rng(seed).normal(size=(TINY_VOCABULARY, 8))
    lm.backbone.token_embedding.embeddings.assign(table)
    return lm


def quick_compile(lm, optimizer="adam"):
    """Compiles a model for a few steps: XLA takes longer over a train step on TensorFlow than the steps without it."""
    lm.compile(optimizer, **({"jit_compile": False} if keras.backend.backend() == "tensorflow" else {}))


def variables_by_name(block):
    """The oracle's weight names to the variables of a block."""
    parts = {
        "query": block.attention.query, "key": block.attention.key, "value": block.attention.value,
        "output": block.attention.output_projection, "query_norm": block.attention.query_norm,
        "key_norm": block.attention.key_norm, "attention_norm": block.attention_norm,
        "feedforward_norm": block.feedforward_norm, "post_attention_norm": block.post_attention_norm,
        "post_feedforward_norm": block.post_feedforward_norm, "gate": block.gate, "up": block.up, "down": block.down,
    }  # fmt: skip
    parts |= {"update": block.attention.memory_update, "experts": block.feed_forward}
    found = {}
    for name, layer in parts.items():
        for variable in [] if layer is None else layer.weights:
            if variable.name != "noise_scale":
                kind = {"gamma": "scale", "beta": "bias"}.get(variable.name, variable.name)
                found[f"{name}_{kind}"] = variable
    if block.attention.softmax_sink_logit is not None:
        found["softmax_sink"] = block.attention.softmax_sink_logit
    if block.attention.gate_bias is not None:
        found["fam_gate"] = block.attention.gate_bias
    return found


def set_weights(block, weights, fam0=None):
    variables = variables_by_name(block)
    assert set(variables) == set(weights), set(variables) ^ set(weights)
    for name, variable in variables.items():
        variable.assign(weights[name])
    if fam0 is not None:
        block.attention.initial_fam_rows.assign(fam0)


def copy_weights(source, target):
    """Gives `target` the weights of `source` that have the same names within a layer or a language model."""
    depth = 1 if isinstance(source, keras_fam.TransformerFAMBlock) else 2
    named = {v.path.split("/", depth)[-1]: v for v in source.weights}
    for v in target.weights:
        v.assign(named[v.path.split("/", depth)[-1]])


def oracle_inputs(cfg, fam0):
    """How the oracle is told the first memory of a block that stands alone."""
    if fam0 is None:
        return {}
    inputs = {"rows_below": fam0} if cfg["initial_fam"] == "summary" else {"fam0": fam0}
    return inputs | ({"rows_below": fam0} if cfg["fam_query"] == "anchored" else {})


def call(function, *inputs, **options):
    """`function(*inputs, **options)` of a layer or of one of its methods; on JAX as one program.

    Called outside of one, it takes JAX longer: every operation of a model is compiled for every shape.
    """
    if keras.backend.backend() != "jax":
        return function(*inputs, **options)
    switches = {name: value for name, value in options.items() if isinstance(value, bool)}
    given = {name: value for name, value in options.items() if name not in switches}
    layer = getattr(function, "__self__", function)
    program = compiled(lambda inputs, given: function(*inputs, **given, **switches), lambda: layer.variables)
    return program(keras.tree.map_structure(ops.convert_to_tensor, inputs), given)


def numpy(x):
    return np.asarray(ops.convert_to_numpy(x))


def relative(actual, expected):
    """Largest difference over the largest magnitude of what is expected."""
    actual, expected = np.asarray(numpy(actual), "float64"), np.asarray(numpy(expected), "float64")
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.abs(actual - expected).max(initial=0.0) / max(np.abs(expected).max(initial=0.0), 1e-30))


def close(actual, expected, tolerance):
    error = relative(actual, expected)
    backend = keras.backend.backend()
    assert error <= tolerance, f"{backend}: relative error {error:.2e} exceeds {tolerance:.0e}"


def states_close(actual, expected, tolerance):
    for (path, a), (_, b) in zip(
        keras.tree.flatten_with_path(actual), keras.tree.flatten_with_path(expected), strict=True
    ):
        error = relative(numpy(a).astype("float64"), numpy(b).astype("float64"))
        assert error <= tolerance, f"{keras.backend.backend()}: {path}: {error:.2e} exceeds {tolerance:.0e}"


def gradients(function, arrays):
    """Gradients of scalar `function(*tensors)` with respect to NumPy arrays or variables, as NumPy arrays.

    Entries of `arrays` are NumPy arrays (handed to `function` as tensors, in order) or `keras.Variable`s.
    """
    values = [a for a in arrays if not isinstance(a, keras.Variable)]
    variables = [a for a in arrays if isinstance(a, keras.Variable)]
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        def pure(values, variable_values):
            with keras.StatelessScope(state_mapping=list(zip(variables, variable_values, strict=True))):
                return function(*values)

        given = [ops.convert_to_tensor(v) for v in values]
        found = jax.jit(jax.grad(pure, argnums=(0, 1)))(given, [v.value for v in variables])
    elif backend == "tensorflow":
        import tensorflow as tf

        given = [tf.convert_to_tensor(v) for v in values]
        with tf.GradientTape() as tape:
            for v in given:
                tape.watch(v)
            loss = function(*given)
        grads = tape.gradient(loss, given + [v.value for v in variables], unconnected_gradients="zero")
        found = grads[: len(given)], grads[len(given) :]
    else:
        import torch

        given = [ops.convert_to_tensor(v).clone().requires_grad_(True) for v in values]
        tensors = given + [v.value for v in variables]
        grads = torch.autograd.grad(function(*given), tensors, allow_unused=True)
        grads = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, tensors, strict=True)]
        found = grads[: len(given)], grads[len(given) :]
    first, second = ([numpy(g) for g in group] for group in found)
    first, second = iter(first), iter(second)
    return [next(second) if isinstance(a, keras.Variable) else next(first) for a in arrays]
