"""`check_streaming` holds for every variant, and fails, by name, for layers that break a contract."""

import keras
import numpy as np
import pytest
from keras import ops
from support import HIDDEN_DIM, SMALL, VARIANTS, make

import keras_fam
from keras_fam import FeedbackAttention, TransformerFAMBackbone, TransformerFAMBlock, TransformerFAMCausalLM
from keras_fam.ops import masks

CONTRACTS = {"chunks", "state_size", "future", "rows", "padding", "padding_removed", "lengths", "reset", "gradients"}
TORCH = keras.backend.backend() == "torch"


def small(variant):
    """Settings and tokens. JAX compiles each operation for each new shape: blocks are of 2 and sizes repeat."""
    if TORCH:
        return {}, None
    settings = {**SMALL, **VARIANTS[variant]}
    most = {"block_size": 2, "fam_length": 2, "num_visible_memories": 2, "memory_segments": 2, "num_key_value_heads": 2}
    sizes = {name: min(settings.get(name, 1), size) for name, size in most.items()}
    if variant in ("mha", "mqa"):
        sizes["num_query_heads"] = 2
    if "attention_sinks" in settings:
        sizes["attention_sinks"] = min(settings["attention_sinks"], 2)
    if "attention_window" in settings:
        sizes["attention_window"] = min(settings["attention_window"], 2 * sizes["memory_segments"] + 1)
    return sizes, 5


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(variant):
    settings, tokens = small(variant)
    report = keras_fam.check_streaming(make(variant, **settings)[0], tokens=tokens)
    assert set(report) == CONTRACTS
    assert all(report[name] == 0 for name in ("future", "rows", "padding", "state_size"))
    assert 0 < report["chunks"] < 1e-5  # not 0: there was something to compare


@pytest.mark.parametrize("initial_fam", ["prompt", "summary"])
def test_attention_alone(initial_fam):
    settings, tokens = small("fam")
    settings = {**SMALL, **settings, "initial_fam": initial_fam}
    del settings["intermediate_dim"]
    layer = FeedbackAttention(**settings)
    layer.build((None, None, HIDDEN_DIM))
    assert set(keras_fam.check_streaming(layer, tokens=tokens)) == CONTRACTS


@pytest.mark.parametrize("variant", ["fam", "bswa_m1"])
def test_rows_without_tokens_may_stand_within_a_block(variant):
    """`aligned` promises something of the rows with tokens alone; the others keep their state to the bit."""
    layer, x = make(variant)[0], np.random.default_rng(0).normal(size=(2, 8, HIDDEN_DIM)).astype("float32")
    _, state = layer.advance(x, layer.get_initial_state(2), lengths=np.array([6, 8]), aligned=True)
    _, after = layer.advance(x, state, lengths=np.array([0, 8]), aligned=True)
    for old, new in zip(keras.tree.flatten(state), keras.tree.flatten(after), strict=True):
        assert np.array_equal(ops.convert_to_numpy(old)[0], ops.convert_to_numpy(new)[0])


INPUTS = {"fam_query": "layer_inputs", "initial_fam": "summary", "memory_update": "hard_gate", "fam_gate": -1.0}


@pytest.mark.parametrize("changes", [*({"initial_fam": name} for name in ("prompt", "summary", "prefix")), INPUTS])
def test_language_model(changes):
    settings, tokens = small("fam")
    settings = {**SMALL, **settings, **changes}
    lm = TransformerFAMCausalLM(TransformerFAMBackbone(vocabulary_size=17, num_layers=2, hidden_dim=12, **settings))
    lm.build()
    assert set(keras_fam.check_streaming(lm, tokens=tokens)) == CONTRACTS - {"gradients"}


# Layers that break a contract ---------------------------------------------------------------------------------------

WRONG_BLOCKS = {}


def wrong(contract):
    def register(kind):
        WRONG_BLOCKS[kind.__name__] = (kind, contract)
        return kind

    return register


@wrong("chunks")
class SeesTheNextToken(TransformerFAMBlock):
    def read(self, x, state, chunk, **options):
        y, state = super().read(x, state, chunk, **options)
        return y + ops.pad(x[:, 1:], [[0, 0], [0, 1], [0, 0]]), state


@wrong("future")
class SeesALittleOfTheNextToken(TransformerFAMBlock):
    """Too little for the tolerance of chunks: the future has none."""

    def read(self, x, state, chunk, **options):
        y, state = super().read(x, state, chunk, **options)
        return y + 1e-6 * ops.pad(x[:, 1:], [[0, 0], [0, 1], [0, 0]]), state


@wrong("future")
class SeesALittleOfItsBlock(TransformerFAMBlock):
    """As above, but not across the end of a block: a check that cuts there alone would miss it."""

    def read(self, x, state, chunk, **options):
        y, state = super().read(x, state, chunk, **options)
        inside = np.arange(x.shape[1])[:, None] % self.attention.block_size < self.attention.block_size - 1
        leak = ops.pad(x[:, 1:], [[0, 0], [0, 1], [0, 0]])
        return y + ops.where(ops.convert_to_tensor(inside), 1e-6 * leak, ops.zeros_like(leak)), state


@wrong("chunks")
class ForgetsItsMemory(TransformerFAMBlock):
    def read(self, x, state, chunk, **options):
        y, after = super().read(x, state, chunk, **options)
        if after is None:
            return y, None
        layer = after.layers[0]
        return y, after._replace(layers=(layer._replace(fam_value=ops.zeros_like(layer.fam_value)),))


@wrong("chunks")
class ForgetsWhereItStands(TransformerFAMBlock):
    def read(self, x, state, chunk, **options):
        y, after = super().read(x, state, chunk, **options)
        return y, after and after._replace(position=state.position)


@wrong("rows")
class MixesRows(TransformerFAMBlock):
    def read(self, x, state, chunk, **options):
        y, state = super().read(x, state, chunk, **options)
        return y + 1e-6 * ops.mean(y, axis=0, keepdims=True), state


@wrong("padding")
class ReadsPadding(TransformerFAMBlock):
    def call(self, x, padding_mask=None, **options):
        return super().call(x, **options)


@wrong("lengths")
class IgnoresLengths(TransformerFAMBlock):
    def advance(self, x, state, *, lengths=None, **options):
        return super().advance(x, state, **options)


@wrong("reset")
class IgnoresResets(TransformerFAMBlock):
    def advance(self, x, state, *, reset=None, **options):
        return super().advance(x, state, **options)


@pytest.mark.parametrize("name", WRONG_BLOCKS)
def test_wrong_blocks_are_found(name):
    kind, contract = WRONG_BLOCKS[name]
    settings, tokens = small("fam")
    layer = kind(**{**SMALL, **settings})
    layer.build((None, None, HIDDEN_DIM))
    with pytest.raises(AssertionError, match=f"`{contract}`"):
        keras_fam.check_streaming(layer, tokens=tokens)


def test_a_wrong_mask_is_found(monkeypatch):
    """Attention to one token too many, in whole blocks and in single tokens alike."""
    settings, tokens = small("fam")
    visible = masks.visible
    monkeypatch.setattr(masks, "visible", lambda query, key, **options: visible(query + 1, key, **options))
    with pytest.raises(AssertionError, match=r"`(chunks|future)`"):
        keras_fam.check_streaming(make(**settings)[0], tokens=tokens)


class RunningSum:
    """y_t = x_0 + … + x_t: the smallest layer with this interface, and one fault at a time."""

    name, block_size, hidden_dim, compute_dtype = "running_sum", 2, 3, "float32"

    def __init__(self, fault=None):
        self.fault, self.calls = fault, 0

    def get_initial_state(self, batch_size):
        return (ops.zeros((batch_size, self.hidden_dim)),)

    def __call__(self, x, padding_mask=None, return_state=False):
        x = ops.convert_to_tensor(x)
        if padding_mask is not None:
            x = ops.where(ops.convert_to_tensor(padding_mask)[:, :, None], x, 1.0 if self.fault == "counts" else 0.0)
        y, state = self.advance(x, self.get_initial_state(x.shape[0]))
        return (y, state) if return_state else y

    def advance(self, x, state, lengths=None, reset=None):
        x, carried = ops.convert_to_tensor(x), state[0][:, : self.hidden_dim]
        if self.fault == "detaches":
            carried = ops.stop_gradient(carried)
        if reset is not None:
            carried = ops.where(ops.convert_to_tensor(reset)[:, None], 0.0, carried)
        if lengths is not None:
            real = ops.arange(x.shape[1]) < ops.convert_to_tensor(lengths)[:, None]
            x = ops.where(real[:, :, None], x, 0.0)
        y = ops.expand_dims(carried, 1) + ops.cumsum(x, axis=1)
        last = y[:, -1]
        if self.fault == "grows":
            last = ops.concatenate([last, state[0]], axis=1)
        return y, (last,)


def test_any_layer_with_this_interface():
    assert set(keras_fam.check_streaming(RunningSum())) == CONTRACTS


@pytest.mark.parametrize(
    ("fault", "contract"), [("counts", "padding_removed"), ("detaches", "gradients"), ("grows", "state_size")]
)
def test_wrong_layers_are_found(fault, contract):
    with pytest.raises(AssertionError, match=f"`{contract}`"):
        keras_fam.check_streaming(RunningSum(fault))


def test_the_messages_say_how_far_and_where():
    with pytest.raises(AssertionError, match=r"relative difference \d\.\d+e[+-]\d+ > 1e-05, split \[1, 1"):
        keras_fam.check_streaming(SeesTheNextTokenBuilt())


def SeesTheNextTokenBuilt():
    settings, _ = small("fam")
    layer = SeesTheNextToken(**{**SMALL, **settings})
    layer.build((None, None, HIDDEN_DIM))
    return layer
