"""Distillation: a streaming model learns from what its own weights say with full attention."""

import keras
import numpy as np
from keras import ops

from keras_fam.layers.quantization import quantized_sublayers

MEMORY_SETTINGS = ("fam_", "memory_update", "initial_fam", "num_visible_memories", "random_state_passing")


def forward_kl(logits, teacher, temperature: float = 1.0):
    """KL(teacher ‖ student) of each token, in nats: Σ p·(log p − log q), with p and q the softmax of logits.

    Zero where both agree. The gradient with respect to the student's logits is (q − p) / temperature.

    Args:
        logits: `[..., V]`, of the student.
        teacher: `[..., V]`, logits of the teacher, through which no gradient passes; or the pair `(token_ids, logs)` of
            `top_probabilities`: then the tokens that it leaves out count as one, so that the result is at most that of
            all logits, and still zero where both agree.
        temperature: float above 0 by which the logits of both are divided (a pair's are divided already).

    Returns:
        float32 `[...]`.

    Raises:
        ValueError: for a temperature that is not positive.

    Example:

    ```python
    nats = keras_fam.training.forward_kl(lm(tokens), teacher(tokens))    # [B, T]
    ```
    """
    _check_temperature(temperature)
    logs = _log_softmax(logits, temperature)
    if isinstance(teacher, tuple):
        token_ids, target = (ops.stop_gradient(ops.convert_to_tensor(x)) for x in teacher)
        chosen = ops.take_along_axis(logs, ops.cast(token_ids, "int32"), axis=-1)
        return _kl(_with_rest(ops.cast(target, "float32")), _with_rest(chosen))
    return _kl(ops.stop_gradient(_log_softmax(teacher, temperature)), logs)


def top_probabilities(logits, k: int, temperature: float = 1.0):
    """The k most probable tokens of a teacher and the logarithms of their probabilities, to be kept for training.

    Args:
        logits: `[..., V]`.
        k: int, from 1 to V.
        temperature: see `forward_kl`.

    Returns:
        `(token_ids, logs)`: int32 and float32 `[..., k]`.

    Example:

    ```python
    kept = keras_fam.training.top_probabilities(teacher(tokens), k=32)
    nats = keras_fam.training.forward_kl(lm(tokens), kept)
    ```
    """
    _check_temperature(temperature)
    logs, token_ids = ops.top_k(_log_softmax(logits, temperature), k)
    return ops.cast(token_ids, "int32"), logs


@keras.saving.register_keras_serializable(package="keras_fam")
class ForwardKL(keras.losses.Loss):
    """`forward_kl` as a loss for `compile`, with the teacher's logits `[B, T, V]` as targets.

    Args:
        temperature: see `forward_kl`.
        weight: float, by which the loss is multiplied.
        reduction, name: see `keras.losses.Loss`.

    Example:

    ```python
    teacher = keras_fam.training.full_attention(lm, max_tokens=tokens.shape[1])
    lm.compile("adam", loss=keras_fam.training.ForwardKL(), weighted_metrics=None)
    lm.fit(tokens, teacher.predict(tokens))
    ```
    """

    def __init__(self, temperature=1.0, weight=1.0, reduction="sum_over_batch_size", name="forward_kl", **kwargs):
        super().__init__(reduction=reduction, name=name, **kwargs)
        _check_temperature(temperature)
        self.temperature, self.weight = float(temperature), float(weight)

    def call(self, y_true, y_pred):
        return self.weight * forward_kl(y_pred, y_true, self.temperature)

    def get_config(self):
        return {**super().get_config(), "temperature": self.temperature, "weight": self.weight}


def full_attention(lm, max_tokens: int, **changes):
    """The same language model with full attention: a teacher whose weights are copies and are not trained.

    It has no memory and no attention sinks, and its window holds `max_tokens` tokens; where the model was trained with
    full attention (a converted one), let that be at most the length that it was trained for. LoRA updates are left out,
    so the teacher of a converted model is what was converted. A window of the model's layers (`attention_window`)
    stays.

    Args:
        lm: a built `TransformerFAMCausalLM`.
        max_tokens: int, tokens of the longest text.
        **changes: other settings of the backbone, such as `dtype`; with `memory_segments` and `attention_sinks`, any
            window: `full_attention(lm, 0, memory_segments=1, attention_sinks=4)` is the model without its memory.

    Returns:
        A `TransformerFAMCausalLM` with `trainable=False`.

    Raises:
        ValueError: for a model whose weights are quantized.

    Example:

    ```python
    teacher = keras_fam.training.full_attention(lm, max_tokens=8192)
    ```
    """
    from keras_fam.models.transformer_fam_backbone import TransformerFAMBackbone  # which imports this package
    from keras_fam.models.transformer_fam_causal_lm import TransformerFAMCausalLM

    config = lm.backbone.get_config()
    kept = {name: value for name, value in config.items() if not name.startswith(MEMORY_SETTINGS) and name != "name"}
    segments = max(0, -(-int(max_tokens) // config["block_size"]) - 1)
    kept |= {"fam_length": 0, "memory_segments": segments, "attention_sinks": 0, **changes}
    backbone = TransformerFAMBackbone.from_config(kept)
    teacher = TransformerFAMCausalLM(backbone, preprocessor=lm.preprocessor)
    teacher.build()
    for variable, source in shared_weights(teacher, lm):
        variable.assign(ops.copy(ops.cast(source.value, variable.dtype)))  # `fit` may reuse the memory of the source
    teacher.trainable = False
    return teacher


def shared_weights(teacher, lm):
    """Pairs `(variable, source)`: each weight of a model without memory, and that of a model with memory.

    Raises:
        ValueError: if the second model lacks one of them, or has it in another form.
    """
    quantized = sorted(quantized_sublayers(lm.backbone))
    if quantized:
        raise ValueError(
            f"The weights of a teacher are those of a model that is not quantized; {quantized[0]} of {lm.name} is. "
            "Make the teacher before `quantize`."
        )
    sources = _by_place(lm.backbone)
    pairs = []
    for place, variable in _by_place(teacher.backbone).items():
        source = sources.get(place)
        if source is None or tuple(source.shape) != tuple(variable.shape):
            raise ValueError(f"{lm.name} has no weight {place!r} of shape {tuple(variable.shape)} to share.")
        pairs.append((variable, source))
    return pairs


def _by_place(backbone):
    """dict from the paths within a backbone to its weights."""
    return {variable.path.rpartition(f"{backbone.name}/")[2]: variable for variable in backbone.weights}


def _log_softmax(logits, temperature):
    return ops.log_softmax(ops.cast(logits, "float32") / temperature, axis=-1)


def _kl(target, logs):
    return ops.sum(ops.exp(target) * (target - logs), axis=-1)


def _with_rest(logs):
    """Log-probabilities `[..., k]`, and behind them that of all other tokens together."""
    rest = 1.0 - ops.sum(ops.exp(logs), axis=-1, keepdims=True)
    return ops.concatenate([logs, ops.log(ops.maximum(rest, 1e-9))], axis=-1)


def _check_temperature(temperature):
    if not np.isfinite(temperature) or temperature <= 0:
        raise ValueError(f"`temperature` must be a positive number. Received: {temperature!r}")
