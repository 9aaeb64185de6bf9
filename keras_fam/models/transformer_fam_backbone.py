"""TransformerFAMBackbone: embedding, memory prompt, layers, final norm."""

import functools
import inspect
import math

import keras
from keras import ops

from keras_fam.baselines.rmt import feed_to_bottom, scan_blocks
from keras_fam.distribution.layout_map import layout_map
from keras_fam.distribution.state_sharding import shard_output, shard_state
from keras_fam.layers.feedback_attention import FeedbackAttention
from keras_fam.layers.random_state_passing import RandomStatePassing
from keras_fam.layers.transformer_fam_block import TransformerFAMBlock
from keras_fam.layers.validation import require_positive, require_whole
from keras_fam.models.initial_state import make_initial_state
from keras_fam.models.lora import LoRAMixin
from keras_fam.models.preset_io import PresetMixin, load_backbone
from keras_fam.models.scan_layers import SEEDS_PER_LAYER, remat_layer, scan_layers_once
from keras_fam.models.scan_steps import scan_steps, step_blocks
from keras_fam.models.streaming_call import StreamingModelMixin
from keras_fam.models.token_inputs import TokenInputsMixin
from keras_fam.ops.random import fold_in, next_seed
from keras_fam.ops.token_ids import clip_token_ids
from keras_fam.state import StreamState, advance_position, position_spec
from keras_fam.training.checked_inputs import CheckedInputs

# Settings of a block that the backbone decides itself.
_OWN = {
    "self",
    "name",
    "dtype",
    "trainable",
    "stateful",
    "attention",
    "kwargs",
    "own_initial_fam",
    "kernel_initializer",
}


def block_settings():
    """Names of the settings that every layer of a backbone takes, from the signatures of block and attention."""
    names = [*inspect.signature(TransformerFAMBlock.__init__).parameters]
    names += inspect.signature(FeedbackAttention.__init__).parameters
    return {name for name in names if name not in _OWN}


@keras.saving.register_keras_serializable(package="keras_fam")
class TransformerFAMBackbone(LoRAMixin, PresetMixin, CheckedInputs, TokenInputsMixin, StreamingModelMixin, keras.Model):
    """Token ids to hidden states, with one memory per layer (Alg. 2, App. B).

    Weights are made at the first call, or by `build()`.

    Args:
        vocabulary_size: V.
        num_layers: L.
        hidden_dim: D.
        num_query_heads: N.
        intermediate_dim: width of the feed-forward part.
        num_key_value_heads: K; None means N.
        head_dim: H; None means D // N.
        initial_fam: `"prompt"` (default): F learned rows at token-embedding level, one set for the whole model,
            forwarded through the layers alone; `"summary"`: the same rows ride up with block 1; `"prefix"`: a set per
            layer (App. B.1). With memory, these rows are the only weights that a plain Transformer lacks.
        embedding_scale: None, or a factor of the token embeddings (Gemma).
        tie_weights: whether the output head is the transposed embedding.
        logit_softcap: None, or the soft cap of the logits (Gemma 2).
        layer_settings: None, or one dict per layer with settings of that layer alone (Gemma 3's local layers).
        random_state_passing: p of Random State Passing in training (App. B.2.3); 0 turns it off, the paper has 0.8.
            Or a schedule of it, see `RandomStatePassing`.
        random_position_offset: whether Random Position Offset is drawn in training (App. B.2.2). Positions are
            relative here, so it changes results for `fam_position="zero"` alone.
        blocks_per_step: how many blocks are advanced at a time: memory for a long input stays that of one step; no
            result changes. None chooses: steps of 4,096 tokens, but in training 4 blocks with `remat`, all without.
        remat: whether each such step is computed again in the backward pass instead of being stored
            (`keras.remat`): only the states at the boundaries of steps are kept, and gradients stay the same.
            `"layers"`: so, and within a step each layer is computed once more, so that the insides of one layer are
            held at a time. On a CPU, JAX saves nothing by it without `scan_layers`.
        backpropagation_steps: None, or how many such steps gradients cross at most: states are detached after every
            so many steps of a call, counted from its start (truncated back-propagation). None: the whole call.
        scan_layers: whether a call of at least a block runs the layers, which must be equal, as one compiled loop:
            compile time no longer grows with their number (JAX, TensorFlow), at the price of one copy of the weights
            per call.
        **block: every other setting of `TransformerFAMBlock`: `block_size`, `memory_segments`, `fam_length`, …

    Calls: `hidden = backbone(token_ids)` with token ids int `[B, T]`, or a dict of `"token_ids"` and
    `"padding_mask"`; `hidden` is `[B, T, D]`. `hidden, state = backbone(..., initial_state=state, return_state=True)`.
    The pure function behind both is `advance`.

    Raises:
        ValueError: for settings that contradict each other, and TypeError for unknown ones.
    """

    def __init__(
        self,
        vocabulary_size: int,
        num_layers: int,
        hidden_dim: int,
        num_query_heads: int,
        intermediate_dim: int,
        *,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        initial_fam: str = "prompt",
        embedding_scale: float | None = None,
        tie_weights: bool = True,
        logit_softcap: float | None = None,
        layer_settings: list | None = None,
        random_state_passing=0.0,
        random_position_offset: bool = False,
        blocks_per_step: int | None = None,
        remat: bool | str = False,
        backpropagation_steps: int | None = None,
        scan_layers: bool = False,
        name: str | None = None,
        dtype=None,
        trainable: bool = True,
        **block,
    ):
        super().__init__(name=name, dtype=dtype, trainable=trainable)
        for key, value in (
            ("vocabulary_size", vocabulary_size),
            ("num_layers", num_layers),
            ("hidden_dim", hidden_dim),
        ):
            require_whole(key, value, 1)
        require_whole("num_query_heads", num_query_heads, 1)
        for key, value in (("blocks_per_step", blocks_per_step), ("backpropagation_steps", backpropagation_steps)):
            if value is not None:
                require_whole(key, value, 1)
        if logit_softcap is not None:
            require_positive("logit_softcap", logit_softcap)
        unknown = sorted(set(block) - block_settings())
        if unknown:
            raise TypeError(
                f"TransformerFAMBackbone knows no setting {unknown}; layers take {sorted(block_settings())}."
            )
        if head_dim is None and hidden_dim % num_query_heads:
            raise ValueError(
                "`hidden_dim` is a multiple of `num_query_heads` unless `head_dim` is given; received "
                f"{hidden_dim} and {num_query_heads}."
            )
        if layer_settings is not None and len(layer_settings) != num_layers:
            raise ValueError(f"`layer_settings` has one dict per layer, {num_layers}; received {len(layer_settings)}.")
        if remat not in (False, True, "layers"):
            raise ValueError(
                f'`remat` is False, True (steps of blocks) or "layers" (and layers within them); received {remat!r}.'
            )
        if scan_layers and layer_settings is not None:
            raise ValueError(
                "`scan_layers=True` runs all layers as one loop, so they are equal; received `layer_settings` too. "
                "Leave one of them out."
            )
        if scan_layers and block.get("fam_recurrence") == "stack":
            raise ValueError(
                '`fam_recurrence="stack"` (RMT) hands the top layer\'s memory to the bottom one, which the loop of '
                "`scan_layers=True` does not; received both. Leave one of them out."
            )
        self.vocabulary_size, self.num_layers, self.hidden_dim = vocabulary_size, num_layers, hidden_dim
        self.block_settings = {
            "num_query_heads": num_query_heads,
            "num_key_value_heads": num_query_heads if num_key_value_heads is None else num_key_value_heads,
            "head_dim": hidden_dim // num_query_heads if head_dim is None else head_dim,
            "intermediate_dim": intermediate_dim,
            "initial_fam": initial_fam,
            **block,
        }
        self.layer_settings = layer_settings
        self.initial_fam = initial_fam
        self.embedding_scale, self.tie_weights, self.logit_softcap = embedding_scale, tie_weights, logit_softcap
        self.random_position_offset = random_position_offset
        self.backpropagation_steps = backpropagation_steps
        self.blocks_per_step, self.remat, self.scan_layers = blocks_per_step, remat, scan_layers
        self.token_embedding = keras.layers.ReversibleEmbedding(
            vocabulary_size,
            hidden_dim,
            tie_weights=tie_weights,
            embeddings_initializer=keras.initializers.RandomNormal(stddev=0.02),
            logit_soft_cap=logit_softcap,
            dtype=self.dtype_policy,
            name="token_embedding",
        )
        self.blocks = [
            TransformerFAMBlock(
                **{**self.block_settings, **(layer_settings[i] if layer_settings else {})},
                own_initial_fam=initial_fam == "prefix",
                kernel_initializer=keras.initializers.VarianceScaling(1.0, "fan_in", "truncated_normal"),
                dtype=self.dtype_policy,
                name=f"block_{i}",
            )
            for i in range(num_layers)
        ]
        first = self.blocks[0].attention
        sizes = ("block_size", "fam_length", "initial_fam", "num_visible_memories", "fam_recurrence")
        for i, layer in enumerate(self.blocks):
            for key in sizes:
                if getattr(layer.attention, key) != getattr(first, key):
                    raise ValueError(f"`{key}` is the same in all layers; layer_settings[{i}] changes it.")
        self.block_size, self.fam_length = first.block_size, first.fam_length
        self.feeds_stack = bool(first.fam_length) and first.fam_recurrence == "stack"
        self.final_norm = self.blocks[0].make_norm("final_norm")
        self.random_state_passing = None
        if random_state_passing and self.fam_length:
            self.random_state_passing = RandomStatePassing(
                random_state_passing, num_layers, self.fam_length, dtype=self.dtype_policy, name="random_state_passing"
            )
        self.seed_generator = keras.random.SeedGenerator() if self._draws else None

    @classmethod
    def from_preset(cls, folder, *, load_weights=True, **changes):
        """The backbone in a folder; see `TransformerFAMCausalLM.from_preset`."""
        return load_backbone(folder, cls, load_weights, **changes)[0]

    @property
    def output_width(self):
        return self.hidden_dim

    @property
    def passes_state(self):
        """Whether training steps hand a memory on (Random State Passing)."""
        return self.random_state_passing is not None

    @property
    def _draws(self):
        return self.random_position_offset or any(block.draws for block in self.blocks)

    def build(self, input_shape=None):
        """Makes all weights; `input_shape` may be left out."""
        if self.built:
            return
        shape = (None, None, self.hidden_dim)
        self.token_embedding.build((None, None))
        for block in self.blocks:
            block.build(shape)
        self.final_norm.build(shape)
        self.memory_prompt = None
        if self.fam_length and self.initial_fam != "prefix":
            self.memory_prompt = self.add_weight(
                shape=(self.fam_length, self.hidden_dim),
                initializer=keras.initializers.RandomNormal(stddev=0.02),
                name="memory_prompt",
            )
        if self.random_state_passing is not None:
            self.random_state_passing.build(shape)
        self.built = True

    # State ------------------------------------------------------------------------------------------------------

    def state_spec(self, batch_size=None):
        """`StreamState` of `Spec`s (shape and dtype), for `batch_size` rows."""
        return StreamState(position_spec(batch_size), tuple(b.layer_state_spec(batch_size) for b in self.blocks))

    def get_initial_state(self, batch_size):
        """The `StreamState` of `batch_size` rows that start anew."""
        if not self.built:
            self.build()
        return make_initial_state(self, batch_size)

    def first_memories(self):
        """F_0 of every layer, a list of `[1, F, D]`; of None where no memory exists before block 1."""
        if not self.fam_length or self.initial_fam == "summary":
            return [None] * self.num_layers
        if self.initial_fam == "prefix":
            return [ops.expand_dims(ops.convert_to_tensor(b.attention.initial_fam_rows), 0) for b in self.blocks]
        rows = ops.expand_dims(ops.convert_to_tensor(self.memory_prompt), 0)
        rows = ops.cast(rows, self.blocks[0].attention.memory_dtype)
        memories = []
        for block in self.blocks:
            memories.append(rows)
            if block is not self.blocks[-1]:
                rows = block.forward_prompt(rows)
        return memories

    # Reading ----------------------------------------------------------------------------------------------------

    def embed(self, token_ids):
        """`[B, T]` token ids to `[B, T, D]`."""
        x = self.token_embedding(clip_token_ids(token_ids, self.vocabulary_size))
        return x if self.embedding_scale is None else x * ops.cast(self.embedding_scale, x.dtype)

    def _finish(self, x):
        return self.final_norm(x)

    def _starting_state(self, batch_size, training):
        """The state of a whole sequence that starts now, and what training draws for it."""
        if not training:
            return make_initial_state(self, batch_size, shared_position=True)
        offset = None
        if self.random_position_offset:
            base = self.block_settings.get("rope_wavelength", 10_000.0) or 0.0
            draw = keras.random.uniform((2, batch_size), seed=self.seed_generator)
            offset = draw[0] * (2 * math.pi * base) * ops.cast(draw[1] < 0.5, "float32")
        passing = self.random_state_passing
        passed = None if passing is None else (passing.choose(batch_size), passing.memory.value)
        return make_initial_state(self, batch_size, shared_position=True, position_offset=offset, passed=passed)

    def _keep_memory(self, before, state):
        if self.random_state_passing is not None:
            written = state.position.block_index[0] > before.position.block_index[0]
            self.random_state_passing.keep([layer.fam for layer in state.layers], written)

    def _advance(self, token_ids, state, *, start, lengths=None, training=False, keep_state=True):
        seed = None
        if training and any(block.draws for block in self.blocks):
            seed = next_seed(self.seed_generator, token_ids)
        x = self.embed(token_ids)
        length, step = x.shape[1], step_blocks(self, training)
        if self.feeds_stack:  # a block needs what the top layer wrote one block before
            step = 1
            if length is None or (start == "anywhere" and length > 1):
                x, state = scan_blocks(self, x, state, start=start, lengths=lengths, seed=seed)
                return self._finish(x), state
        size = None if step is None else step * self.block_size
        if size is None or length is None or length <= size or start == "anywhere":
            if training and self.backpropagation_steps and start == "anywhere" and not (length and length <= size):
                raise ValueError(
                    f"`backpropagation_steps` cuts between steps of {size} tokens, so rows stand at the start of a "
                    f"block; received {length} tokens of rows that may stand anywhere. Train on whole blocks "
                    "(aligned=True), or make the chunks as short as a step."
                )
            x, state = self._advance_layers(
                x, state, start=start, lengths=lengths, seed=seed, training=training, keep_state=keep_state
            )
        else:
            x, state = scan_steps(
                self, x, state, size, lengths=lengths, seed=seed, training=training, keep_state=keep_state
            )
        return self._finish(x), state

    def _advance_layers(self, x, state, *, start, lengths=None, seed=None, training=False, keep_state=True):
        rider = None
        if self.fam_length and self.initial_fam == "summary":
            rider = ops.expand_dims(ops.convert_to_tensor(self.memory_prompt), 0)
        elif self.feeds_stack:
            rider = state.layers[0].fam
        options = {"start": start, "lengths": lengths, "keep_state": keep_state}
        length, replay = x.shape[1], training and self.remat == "layers"
        if self.scan_layers and (length is None or length >= self.block_size):
            x, layers = scan_layers_once(self.blocks, x, state, replay=replay, seed=seed, rider=rider, **options)
        else:
            layers = []
            for i, block in enumerate(self.blocks):
                own = {"rider": rider, "seed": fold_in(seed, SEEDS_PER_LAYER * i), **options}
                advance = functools.partial(remat_layer, block) if replay else block.advance_layer
                x, layer, rider = advance(x, state.layers[i], state.position, **own)
                x = shard_output(x, block)
                layers.append(layer)
        if not keep_state:
            return x, None
        taken = ops.shape(x)[1] if lengths is None else lengths
        position, completed = advance_position(
            state.position, taken, self.block_size, self.blocks[0].attention.max_memories
        )
        if self.feeds_stack:
            layers = feed_to_bottom(self, layers, rider, completed, seed)
        return x, shard_state(StreamState(position, tuple(layers)))

    @staticmethod
    def get_layout_map(device_mesh, model_parallel_dim_name="model", data_parallel_dim_name="batch", settings=None):
        """The layout map for `keras.distribution.ModelParallel`, under KerasHub's name: `keras_fam.layout_map`."""
        return layout_map(
            device_mesh,
            settings,
            model_parallel_dim_name=model_parallel_dim_name,
            data_parallel_dim_name=data_parallel_dim_name,
        )

    def get_config(self):
        config = super().get_config()
        passing = self.random_state_passing
        config.update(
            vocabulary_size=self.vocabulary_size,
            num_layers=self.num_layers,
            hidden_dim=self.hidden_dim,
            embedding_scale=self.embedding_scale,
            tie_weights=self.tie_weights,
            logit_softcap=self.logit_softcap,
            layer_settings=self.layer_settings,
            random_state_passing=0.0 if passing is None else passing.get_config()["rate"],
            random_position_offset=self.random_position_offset,
            blocks_per_step=self.blocks_per_step,
            remat=self.remat,
            backpropagation_steps=self.backpropagation_steps,
            scan_layers=self.scan_layers,
            **self.block_settings,
        )
        return config
