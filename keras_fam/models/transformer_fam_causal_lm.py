"""TransformerFAMCausalLM: next-token logits on top of a backbone."""

import keras

from keras_fam.models.generation import GenerationMixin
from keras_fam.models.lora import LoRAMixin
from keras_fam.models.preset_io import PresetMixin, load_backbone, load_preprocessor
from keras_fam.models.text_inputs import TextTask
from keras_fam.models.token_inputs import TokenInputs
from keras_fam.models.transformer_fam_backbone import TransformerFAMBackbone
from keras_fam.training.checked_inputs import CheckedInputs


@keras.saving.register_keras_serializable(package="keras_fam")
class TransformerFAMCausalLM(
    GenerationMixin, LoRAMixin, PresetMixin, TextTask, CheckedInputs, TokenInputs, keras.Model
):
    """A language model that reads without end: `[B, T]` token ids to `[B, T, V]` logits.

    `fit` takes token ids (or a dict of `"token_ids"` and `"padding_mask"`), the next tokens as targets, and loss
    weights `[B, T]` as sample weights. `compile()` without arguments chooses Adam and the sparse cross-entropy.

    Args:
        backbone: a `TransformerFAMBackbone`.
        preprocessor: None, or an object that is kept with the model (a KerasHub preprocessor).

    Calls, `advance`, `get_initial_state` and `state_spec` are those of the backbone, with logits as outputs.
    """

    def __init__(self, backbone: TransformerFAMBackbone, preprocessor=None, name: str | None = None, **kwargs):
        kwargs.setdefault("dtype", backbone.dtype_policy)
        super().__init__(name=name, **kwargs)
        self.backbone = backbone
        self.preprocessor = preprocessor

    def __setattr__(self, name, value):
        if name == "preprocessor":  # no part of what is computed: kept past Keras' tracking, so it can be replaced
            vars(self)[name] = value
        else:
            super().__setattr__(name, value)

    def build(self, input_shape=None):
        """Makes all weights; `input_shape` may be left out."""
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
        """The language model that `save_to_preset` put into a folder, under any backend.

        Args:
            folder: the folder.
            preprocessor: `"auto"` is the folder's; or None, or an object.
            load_weights: whether the weights are loaded, or drawn anew.
            **changes: settings of the backbone in place of the saved ones, such as `dtype` or `blocks_per_step`.

        Raises:
            ValueError: if the folder is no preset of this package, or its weights do not fit the settings.
            ImportError: if its preprocessor needs KerasHub, and that is missing.
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
