"""TransformerFAMCausalLM: next-token logits on top of a backbone."""

import keras

from keras_fam.models.generation import GenerationMixin
from keras_fam.models.lora import LoRAMixin
from keras_fam.models.preset_io import PresetMixin, load_backbone, load_preprocessor
from keras_fam.models.text_inputs import TextTask
from keras_fam.models.token_inputs import TokenInputs
from keras_fam.models.transformer_fam_backbone import TransformerFAMBackbone
from keras_fam.training.checked_inputs import CheckedInputs
from keras_fam.training.process_training import ProcessTraining


@keras.saving.register_keras_serializable(package="keras_fam")
class TransformerFAMCausalLM(
    GenerationMixin, LoRAMixin, PresetMixin, TextTask, CheckedInputs, TokenInputs, ProcessTraining, keras.Model
):
    """A language model over a stream of any length: token ids `[B, T]` to logits `[B, T, V]`.

    The logits of a token say what comes next: the backbone's hidden states, multiplied by the (transposed) embedding.

    A small model, called and completing a prompt:

    ```python
    backbone = keras_fam.TransformerFAMBackbone(
        vocabulary_size=50, num_layers=1, hidden_dim=16, num_query_heads=2, intermediate_dim=32,
        block_size=8, memory_segments=1, fam_length=2,
    )
    lm = keras_fam.TransformerFAMCausalLM(backbone)
    logits = lm(np.array([[5, 3, 8, 1]]))                      # [1, 4, 50]
    lm.compile(sampler="greedy")                               # Adam, cross-entropy of the next token
    tokens = lm.generate([[5, 3, 8]], max_length=12, stop_token_ids=None)  # a list of 12 ids, the prompt included
    ```

    Trained as any Keras model, with the next tokens as targets, by LoRA alone:

    ```python
    token_ids = np.random.default_rng(0).integers(0, 50, (4, 17))
    lm.enable_lora(rank=2)
    lm.compile("adam")
    history = lm.fit(token_ids[:, :-1], token_ids[:, 1:], batch_size=2, verbose=0)
    ```

    Saved to a folder, and loaded under any backend:

    ```python
    lm.save_to_preset("my_model")
    lm = keras_fam.TransformerFAMCausalLM.from_preset("my_model")
    ```

    A `StreamingModel` around it reads and writes texts without an end; `keras_fam.hub.convert` makes one from a model
    of KerasHub.

    `fit` takes token ids (or a dict of `"token_ids"` and `"padding_mask"`), the next tokens as targets, and loss
    weights `[B, T]` as sample weights; with a preprocessor also strings. Calls, `advance`, `get_initial_state` and
    `state_spec` are those of the backbone, with logits in the compute dtype as outputs.

    Args:
        backbone: a `TransformerFAMBackbone`.
        preprocessor: None, or a preprocessor of KerasHub for strings (`CausalLMPreprocessor`), kept with the model.
        name: name of the model.
        **kwargs: `dtype` (default: the backbone's) and other arguments of `keras.Model`.
    """

    def __init__(self, backbone: TransformerFAMBackbone, preprocessor=None, name: str | None = None, **kwargs):
        kwargs.setdefault("dtype", backbone.dtype_policy)
        super().__init__(name=name, **kwargs)
        self.backbone = backbone
        self.preprocessor = preprocessor

    def __setattr__(self, name, value):
        if name == "preprocessor":  # no part of the computation: not tracked by Keras, so that it can be replaced
            vars(self)[name] = value
        else:
            super().__setattr__(name, value)

    def build(self, input_shape=None):
        """Creates all weights; `input_shape` may be left out."""
        self.backbone.build(input_shape)
        self.built = True

    def compile(self, optimizer="adam", loss="auto", *, weighted_metrics="auto", sampler="top_k", **kwargs):
        """As `keras.Model.compile`; the defaults are next-token cross-entropy and accuracy, weighted by the loss
        weights. `sampler` is what `generate` uses: a name, a config, or an object of `keras_fam.samplers` or
        `keras_hub.samplers`."""
        self.sampler = sampler
        if loss == "auto":
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        if weighted_metrics == "auto":
            weighted_metrics = [keras.metrics.SparseCategoricalAccuracy()]
        super().compile(optimizer=optimizer, loss=loss, weighted_metrics=weighted_metrics, **kwargs)

    def compile_from_config(self, config):
        """Compiles a loaded model as the saved one was, optimizer included."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None and self.built:
            self.optimizer.build(self.trainable_variables)

    @classmethod
    def from_preset(cls, folder, *, preprocessor="auto", load_weights=True, **changes):
        """Loads the language model that `save_to_preset` saved to a folder, under any backend.

        Args:
            folder: str or path of the folder.
            preprocessor: `"auto"` loads the folder's; or None, or an object to use instead.
            load_weights: whether the weights are loaded, or initialized at random.
            **changes: settings of the backbone in place of the saved ones, such as `dtype` or `blocks_per_step`.

        Raises:
            ValueError: if the folder is not a preset of this package, or its weights do not fit the settings.
            ImportError: if its preprocessor needs KerasHub, which is not installed.
        """
        backbone, folder = load_backbone(folder, TransformerFAMBackbone, load_weights, **changes)
        if isinstance(preprocessor, str) and preprocessor == "auto":
            preprocessor = load_preprocessor(folder)
        lm = cls(backbone, preprocessor=preprocessor)
        lm.build()
        return lm

    @property
    def block_size(self):
        """S, tokens in a block."""
        return self.backbone.block_size

    @property
    def fam_length(self):
        """F, rows of memory in each layer; 0 without."""
        return self.backbone.fam_length

    @property
    def output_width(self):
        """V, the width of the outputs."""
        return self.backbone.vocabulary_size

    def state_spec(self, batch_size=None):
        """`StreamState` of `Spec`s (shape and dtype), for `batch_size` rows."""
        return self.backbone.state_spec(batch_size)

    def get_initial_state(self, batch_size):
        """The `StreamState` of `batch_size` rows before their first token."""
        return self.backbone.get_initial_state(batch_size)

    def sequence_state(self, batch_size, training):
        return self.backbone.sequence_state(batch_size, training)

    def needs_state(self, training):
        return self.backbone.needs_state(training)

    def finish_call(self, before, state, held, training):
        self.backbone.finish_call(before, state, held, training)

    def read(self, token_ids, state, chunk, *, training=False):
        hidden, state = self.backbone.read(token_ids, state, chunk, training=training)
        return self.backbone.token_embedding(hidden, reverse=True), state

    def get_config(self):
        config = super().get_config()
        config["backbone"] = keras.saving.serialize_keras_object(self.backbone)
        config["preprocessor"] = keras.saving.serialize_keras_object(self.preprocessor)
        return config

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        config["backbone"] = keras.saving.deserialize_keras_object(config["backbone"])
        config["preprocessor"] = keras.saving.deserialize_keras_object(config["preprocessor"])
        return cls(**config)
