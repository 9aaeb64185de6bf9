"""TransformerFAMBackbone: embedding, memory prompt, layers, final norm."""

import functools

import keras
from keras import ops

from keras_fam.distribution.layout_map import layout_map
from keras_fam.distribution.state_sharding import shard_output, shard_state
from keras_fam.layers.memory_scan import rows_for_lowest
from keras_fam.layers.random_state_passing import RandomStatePassing
from keras_fam.layers.transformer_fam_block import TransformerFAMBlock
from keras_fam.models.backbone_settings import check_equal_settings, check_settings, for_blocks, for_single_blocks
from keras_fam.models.initial_state import make_initial_state
from keras_fam.models.lora import LoRAMixin
from keras_fam.models.preset_io import PresetMixin, load_backbone
from keras_fam.models.scan_layers import SEEDS_PER_LAYER, remat_layer, scan_layers
from keras_fam.models.scan_steps import scan_steps, step_blocks
from keras_fam.models.token_inputs import TokenInputs
from keras_fam.ops.random import fold_in, next_seed
from keras_fam.ops.token_ids import clip_token_ids
from keras_fam.state import StreamState, advance_position, position_spec
from keras_fam.training.checked_inputs import CheckedInputs


@keras.saving.register_keras_serializable(package="keras_fam")
class TransformerFAMBackbone(LoRAMixin, PresetMixin, CheckedInputs, TokenInputs, keras.Model):
    """Token ids to hidden states, with one memory per layer (Alg. 2, App. B).

    Weights are made at the first call, or by `build()`.

    ```python
    backbone = keras_fam.TransformerFAMBackbone(
        vocabulary_size=1000, num_layers=2, hidden_dim=64, num_query_heads=4, intermediate_dim=128,
        block_size=32, memory_segments=1, fam_length=8,
    )
    token_ids = np.random.randint(0, 1000, (2, 100))
    hidden = backbone(token_ids)                                             # [2, 100, 64]
    hidden, state = backbone(token_ids, return_state=True)
    hidden, state = backbone(token_ids, initial_state=state, return_state=True)   # continues the texts

    backbone = keras_fam.TransformerFAMBackbone(**keras_fam.model_config("small", vocabulary_size=5000))
    ```

    Args:
        vocabulary_size: V.
        num_layers: L.
        hidden_dim: D.
        num_query_heads: N.
        intermediate_dim: width of the feed-forward part; may be None with `feed_forward`.
        num_key_value_heads: K, a divisor of N; None means N.
        head_dim: H; None means D // N.
        block_size: S, tokens in a block; the memory is written once per block.
        memory_segments: m, past blocks whose keys and values stay visible.
        fam_length: F, rows of memory in each layer; 0 is TransformerBSWA, without memory.
        initial_fam: `"prompt"` (default): F learned rows at token-embedding level, one set for the whole model,
            forwarded through the layers alone; `"summary"`: the same rows pass up the layers with block 1, whose tokens
            read no memory; `"prefix"`: a set per layer (App. B.1). In the paper's form, these rows are the only weights
            that a plain Transformer lacks.
        fam_query: `"feedback"` (the paper's form): a layer's memory writes the next one; `"anchored"` (an addition of
            this project): the memory prompt passes up the layers in every block, and what a layer makes of the rows is
            what it writes; `"layer_inputs"`: likewise, but a layer remembers the rows as they enter it (two layers or
            more). See `FeedbackAttention`.
        memory_update: `"residual"` (the paper's), `"normalized"`, `"average"`, `"hard_gate"`, or a
            `keras_fam.MemoryUpdate`, of which each layer gets a copy. The last two may have weights.
        fam_gate: None (the paper's form), or where a learned bias on reading the memory starts, one per layer and query
            head; `float("-inf")` closes the memory. See `FeedbackAttention`.
        attention_window, attention_sinks, num_visible_memories, fam_position, fam_query_position, stop_memory_gradient,
            rope_wavelength, rotary_dim, rope_scaling, attention_scale, attention_softcap, softmax_sink,
            use_attention_bias, use_output_bias, query_key_norm, query_key_norm_epsilon: see `FeedbackAttention`.
        feed_forward: None, or any Keras layer in the place of the feed-forward part, of which each layer gets a copy
            with weights of its own (or a layer's config; layers that differ: `layer_settings`). See
            `TransformerFAMBlock` and `MixtureOfExperts`.
        activation, gated, norm, norm_epsilon, use_post_norm, parallel_residual, use_feedforward_bias, dropout: see
            `TransformerFAMBlock`.
        embedding_scale: None, or a factor of the token embeddings (Gemma).
        tie_weights: whether the output head is the transposed embedding.
        logit_softcap: None, or the soft cap of the logits (Gemma 2).
        layer_settings: None, or one dict per layer with settings of that layer alone (Gemma 3's local layers).
        random_state_passing: p of Random State Passing in training (App. B.2.3); 0 turns it off, the paper has 0.8.
            Or a schedule of it, see `RandomStatePassing`.
        blocks_per_step: how many blocks are advanced at a time: memory for a long input stays that of one step; no
            result changes. None chooses: steps of 4,096 tokens, but in training 4 blocks with `remat`, all without.
        remat: whether each such step is rematerialized, that is, computed again in the backward pass instead of being
            stored (`keras.remat`): only the states at the boundaries of steps are kept, and gradients stay the same.
            `"layers"`: each layer within a step is rematerialized too, so that the activations of one layer are stored
            at a time. On a CPU, JAX saves nothing by it without `scan_layers`.
        backpropagation_steps: None, or how many such steps gradients cross at most: states are detached after every
            so many steps of a call, counted from its start (truncated back-propagation). None: the whole call.
        scan_layers: whether a call of at least a block runs the layers, which must be equal, as one compiled loop:
            compile time no longer grows with their number (JAX, TensorFlow), at the price of one copy of the weights
            per call.
        name, dtype, trainable: as in any Keras model.

    Calls: `hidden = backbone(token_ids)` with token ids int `[B, T]`, or a dict of `"token_ids"` and
    `"padding_mask"`; `hidden` is `[B, T, D]`. `hidden, state = backbone(..., initial_state=state, return_state=True)`.
    The pure function behind both is `advance`.

    Raises:
        ValueError: for settings that contradict each other.
    """

    block_class = TransformerFAMBlock

    def __init__(
        self,
        vocabulary_size: int,
        num_layers: int,
        hidden_dim: int,
        num_query_heads: int,
        intermediate_dim: int | None,
        *,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        # the stream and its memory
        block_size: int = 1024,
        memory_segments: int = 3,
        fam_length: int = 64,
        initial_fam: str = "prompt",
        fam_query: str = "feedback",
        memory_update="residual",
        fam_gate: float | None = None,
        attention_window: int | None = None,
        attention_sinks: int = 0,
        num_visible_memories: int = 1,
        fam_position: str = "last",
        fam_query_position: str = "previous",
        stop_memory_gradient: bool = False,
        # the Transformer layer
        rope_wavelength: float | None = 10_000.0,
        rotary_dim: int | None = None,
        rope_scaling: dict | None = None,
        attention_scale: float | None = None,
        attention_softcap: float | None = None,
        softmax_sink: bool = False,
        use_attention_bias: bool = False,
        use_output_bias: bool = False,
        query_key_norm: str | None = None,
        query_key_norm_epsilon: float | None = None,
        activation="silu",
        gated: bool = True,
        norm: str = "rms_norm",
        norm_epsilon: float = 1e-6,
        use_post_norm: bool = False,
        parallel_residual: bool = False,
        use_feedforward_bias: bool = False,
        feed_forward=None,
        dropout: float = 0.0,
        # the model
        embedding_scale: float | None = None,
        tie_weights: bool = True,
        logit_softcap: float | None = None,
        layer_settings: list | None = None,
        # training and speed
        random_state_passing=0.0,
        blocks_per_step: int | None = None,
        remat: bool | str = False,
        backpropagation_steps: int | None = None,
        scan_layers: bool = False,
        name: str | None = None,
        dtype=None,
        trainable: bool = True,
    ):
        given = dict(locals())
        super().__init__(name=name, dtype=dtype, trainable=trainable)
        check_settings(given)
        self.vocabulary_size, self.num_layers, self.hidden_dim = vocabulary_size, num_layers, hidden_dim
        self.block_settings = for_blocks(given, self.dtype_policy)
        self.layer_settings = for_single_blocks(layer_settings, self.dtype_policy)
        self.initial_fam = initial_fam
        self.embedding_scale, self.tie_weights, self.logit_softcap = embedding_scale, tie_weights, logit_softcap
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
        self.blocks = [self._make_block(i) for i in range(num_layers)]
        check_equal_settings(self.blocks)
        first = self.blocks[0].attention
        self.block_size, self.fam_length = first.block_size, first.fam_length
        self.final_norm = self.blocks[0].make_norm("final_norm")
        self.random_state_passing = None
        if random_state_passing and self.fam_length:
            self.random_state_passing = RandomStatePassing(
                random_state_passing, num_layers, self.fam_length, dtype=self.dtype_policy, name="random_state_passing"
            )
        self.seed_generator = keras.random.SeedGenerator() if self.draws else None

    def _make_block(self, i):
        block = self.block_class(
            **{**self.block_settings, **(self.layer_settings[i] if self.layer_settings else {})},
            kernel_initializer=keras.initializers.VarianceScaling(1.0, "fan_in", "truncated_normal"),
            dtype=self.dtype_policy,
            name=f"block_{i}",
        )
        block.attention.owns_initial_fam = self.initial_fam == "prefix"
        return block

    @classmethod
    def from_preset(cls, folder, *, load_weights=True, **changes):
        """The backbone in a folder; see `TransformerFAMCausalLM.from_preset`."""
        return load_backbone(folder, cls, load_weights, **changes)[0]

    @property
    def output_width(self):
        """D, the width of the outputs."""
        return self.hidden_dim

    @property
    def draws(self):
        """Whether the layers need random numbers in training."""
        return any(block.draws for block in self.blocks)

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
        """The `StreamState` of `batch_size` rows before their first token."""
        if not self.built:
            self.build()
        return make_initial_state(self, batch_size)

    def prompt_rows(self):
        """The memory prompt in the memory's dtype, `[1, F, D]`."""
        rows = ops.expand_dims(ops.convert_to_tensor(self.memory_prompt), 0)
        return ops.cast(rows, self.blocks[0].attention.memory_dtype)

    def first_memories(self):
        """F_0 of every layer, a list of `[1, F, D]`; of None where no memory exists before block 1."""
        if not self.fam_length or self.initial_fam == "summary":
            return [None] * self.num_layers
        if self.initial_fam == "prefix":
            return [block.attention.initial_rows() for block in self.blocks]
        memories = [self.prompt_rows()]
        for block in self.blocks[:-1]:
            memories.append(block.forward_rows(memories[-1]))
        return memories

    def sequence_state(self, batch_size, training):
        passing, passed = self.random_state_passing if training else None, None
        if passing is not None:
            passed = (passing.choose(batch_size), passing.memory.value)
        return make_initial_state(self, batch_size, shared_position=True, passed=passed)

    def needs_state(self, training):
        return training and self.random_state_passing is not None

    def finish_call(self, before, state, held, training):
        written = state.position.block_index[0] > before.position.block_index[0]
        self.random_state_passing.keep([layer.fam for layer in state.layers], written)

    # Reading ----------------------------------------------------------------------------------------------------

    def embed(self, token_ids):
        """`[B, T]` token ids to `[B, T, D]`."""
        x = self.token_embedding(clip_token_ids(token_ids, self.vocabulary_size))
        return x if self.embedding_scale is None else x * ops.cast(self.embedding_scale, x.dtype)

    def read(self, token_ids, state, chunk, *, training=False):
        seed = next_seed(self.seed_generator, token_ids) if training else None
        x, state = self.forward_embedded(self.embed(token_ids), state, chunk, seed=seed, training=training)
        return self.final_norm(x), state

    def forward_embedded(self, x, state, chunk, *, seed=None, training=False):
        """All layers over embedded tokens `[B, T, D]`, a few blocks at a time where the chunk is long."""
        length, step = x.shape[1], step_blocks(self, training)
        size = None if step is None else step * self.block_size
        if size is None or not isinstance(length, int) or length <= size or not chunk.aligned:
            if training and self.backpropagation_steps and not chunk.aligned and not (length and length <= size):
                raise ValueError(
                    f"`backpropagation_steps` cuts between steps of {size} tokens, so rows must stand at the start of "
                    f"a block; received {length} tokens of rows that may stand anywhere. Train on whole blocks "
                    "(aligned=True), or make the chunks as short as a step."
                )
            return self.forward_layers(x, state, chunk, seed=seed, training=training)
        return scan_steps(self, x, state, chunk, size, seed=seed, training=training)

    def forward_layers(self, x, state, chunk, *, seed=None, training=False):
        """All layers over embedded tokens `[B, T, D]`, one after the other."""
        rows = rows_for_lowest(self.blocks[0].attention, self.prompt_rows)
        x, layers, _ = self.run_layers(x, state, chunk, seed=seed, training=training, rows_below=rows)
        if not chunk.keep_state:
            return x, None
        position = advance_position(state.position, chunk, self.blocks[0].max_memories)
        return x, shard_state(StreamState(position, tuple(layers)))

    def run_layers(self, x, state, chunk, *, seed=None, training=False, rows_below=None):
        """`(y, layers, rows_below)`: `[B, T, D]`, a list of `LayerState`s, and what the top layer passes up."""
        length, remat_layers = x.shape[1], training and self.remat == "layers"
        if self.scan_layers and (not isinstance(length, int) or length >= self.block_size):
            options = {"seed": seed, "rows_below": rows_below}
            y, layers = scan_layers(self.blocks, x, state, chunk, remat_layers=remat_layers, **options)
            return y, layers, None
        layers = []
        for i, block in enumerate(self.blocks):
            forward = functools.partial(remat_layer, block) if remat_layers else block.forward_chunk
            own_seed = fold_in(seed, SEEDS_PER_LAYER * i)
            x, layer, rows_below = forward(
                x, state.layers[i], state.position, chunk, seed=own_seed, rows_below=rows_below
            )
            x = shard_output(x, block)
            layers.append(layer)
        return x, layers, rows_below

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
            blocks_per_step=self.blocks_per_step,
            remat=self.remat,
            backpropagation_steps=self.backpropagation_steps,
            scan_layers=self.scan_layers,
            **self.block_settings,
        )
        return config
