"""The trained weights and one compiled training step for each length of texts (JAX)."""

import functools
import time

import jax
import jax.numpy as jnp
import keras
import numpy as np

from keras_fam.models.lora import learned_memory_weights
from keras_fam.training import forward_kl
from keras_fam.training.distillation import shared_weights

GROUPS = ("weights", "lora", "memory", "gate")  # each with a rate of its own


def group_of(variable, memory):
    """Which of `GROUPS` a trainable variable belongs to; `memory` has the ids of those that only a memory needs."""
    if id(variable) in memory:
        return "gate" if variable.name == "fam_gate" else "memory"
    return "lora" if "lora" in variable.name else "weights"


def compile_program(function, *specs):
    """A jitted function, compiled for shapes; without the device's own attention kernel where that does not compile."""
    try:
        return function.lower(*specs).compile()
    except jax.errors.JaxRuntimeError as error:
        print(f"compiled again without flash attention, after: {str(error)[:300]}", flush=True)
        keras.config.disable_flash_attention()  # of this thread
        jax.clear_caches()  # of what was traced with it
        return function.lower(*specs).compile()


class Learner:
    """Trainable values in float32, Adam's moments, and compiled steps.

    Args:
        lm: `TransformerFAMCausalLM`, in the dtype that it computes in. With LoRA, its other weights are fixed.
        rates: dict from `GROUPS` to learning rates, of those groups that there are.
        clip: float, the largest global norm of a gradient.
        teacher: None, or a model of `keras_fam.training.full_attention`: from the weights before training.
        distill: float, the weight of its forward KL beside the loss.
        longest: int, tokens of the longest text that the teacher reads.
    """

    def __init__(self, lm, rates, clip=1.0, teacher=None, distill=0.0, longest=8192):
        self.lm, self.clip = lm, clip
        self.trainable = lm.trainable_variables
        chosen = {id(v) for v in self.trainable}
        self.frozen = [v for v in lm.variables if id(v) not in chosen]
        memory = {id(v) for v in learned_memory_weights(lm.backbone)}
        self.rates = tuple(rates[group_of(v, memory)] for v in self.trainable)
        self.initial = [jnp.array(v.value, "float32") for v in self.trainable]
        self.values = [jnp.copy(x) for x in self.initial]
        self.moments = [[jnp.zeros_like(x) for x in self.values] for _ in range(2)]
        self.fixed = [jnp.asarray(v.value) for v in self.frozen]
        self.teacher, self.distill, self.longest = teacher, distill, longest
        self.taught = []  # each weight of the teacher, and where among `fixed` its value is
        if teacher is not None:
            places = {id(v): i for i, v in enumerate(self.frozen)}
            for variable, source in shared_weights(teacher, lm):
                if id(source) not in places:  # a trained weight: what it is before training
                    places[id(source)] = len(self.fixed)
                    self.fixed.append(jnp.array(source.value))
                self.taught.append((variable, places[id(source)]))
        self.steps, self._evaluate = 0, None
        # Shapes alone: a step hands the memory of its values on while another one is compiled.
        self.specs = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (self.values, self.moments, self.fixed)
        )

    def scope(self, values, fixed):
        """A Keras scope in which the model has these values."""
        return keras.StatelessScope(
            state_mapping=[*zip(self.trainable, values, strict=True), *zip(self.frozen, fixed, strict=False)]
        )

    def hidden(self, values, fixed, token_ids):
        """Last hidden states `[B, T, D]` of whole texts."""
        with self.scope(values, fixed):
            return self.lm.backbone.call(token_ids, training=True)

    def logits(self, values, fixed, hidden):
        """float32 `[*, V]` of hidden states `[*, D]`."""
        with self.scope(values, fixed):
            table = self.lm.backbone.token_embedding.embeddings.value
        return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type="float32")

    def loss(self, values, fixed, token_ids, positions, targets, weights):
        """Mean nats at the positions, by their weights; and whether each target is the most probable token."""
        hidden = self.hidden(values, fixed, token_ids)
        logits = self.logits(values, fixed, jnp.take_along_axis(hidden, positions[..., None], axis=1))
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        nats = jax.nn.logsumexp(logits, axis=-1) - chosen
        right = jnp.argmax(logits, axis=-1) == targets
        loss = jnp.sum(nats * weights) / jnp.maximum(jnp.sum(weights), 1e-6)
        if self.teacher is not None and token_ids.shape[1] <= self.longest:
            loss = loss + self.distill * self.distance(values, fixed, token_ids, hidden, positions.shape[1])
        return loss, (nats, right)

    def distance(self, values, fixed, token_ids, hidden, count):
        """Mean forward KL from the teacher, in nats, at about `count` positions all over the texts."""
        places = slice(None, None, max(1, token_ids.shape[1] // count))
        mapping = [(variable, fixed[place]) for variable, place in self.taught]
        with keras.StatelessScope(state_mapping=mapping):
            theirs = self.teacher.backbone.call(token_ids)[:, places]
            table = self.teacher.backbone.token_embedding.embeddings.value
        theirs = jnp.einsum("...d,vd->...v", theirs, table, preferred_element_type="float32")
        return jnp.mean(forward_kl(self.logits(values, fixed, hidden[:, places]), theirs))

    def update(self, values, moments, fixed, step, factor, *batch):
        """One step of Adam: the new values and moments, and what `loss` returned."""
        (loss, found), gradients = jax.value_and_grad(self.loss, has_aux=True)(values, fixed, *batch)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in gradients))
        # A step without a finite gradient changes nothing.
        scale = jnp.where(jnp.isfinite(norm), jnp.minimum(1.0, self.clip / (norm + 1e-6)), 0.0)
        new_values, first, second = [], [], []
        for value, m, v, gradient, rate in zip(values, *moments, gradients, self.rates, strict=True):
            gradient = jnp.where(jnp.isfinite(norm), gradient, 0.0) * scale
            m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * jnp.square(gradient)
            corrected = m / (1 - 0.9**step) / (jnp.sqrt(v / (1 - 0.99**step)) + 1e-8)
            new_values.append(value - factor * rate * corrected)
            first.append(m)
            second.append(v)
        return new_values, [first, second], loss, norm, found

    def compile(self, rows, tokens, positions):
        """A compiled step for texts of `tokens` tokens, and the seconds that it took to make; runs in any thread."""
        started = time.perf_counter()
        int32, float32 = (functools.partial(jax.ShapeDtypeStruct, dtype=dtype) for dtype in ("int32", "float32"))
        at = (rows, positions)
        shapes = (int32((rows, tokens)), int32(at), int32(at), float32(at))
        step = jax.jit(self.update, donate_argnums=(0, 1))
        program = compile_program(step, *self.specs, float32(()), float32(()), *shapes)
        return program, time.perf_counter() - started

    def step(self, program, batch, factor):
        """Runs a compiled step on a `Batch`, without waiting for it; returns `(loss, norm, nats, right)`."""
        self.steps += 1
        arrays = [jnp.asarray(x) for x in batch[:4]]
        scalars = jnp.float32(self.steps), jnp.float32(factor)
        self.values, self.moments, loss, norm, (nats, right) = program(
            self.values, self.moments, self.fixed, *scalars, *arrays
        )
        return loss, norm, nats, right

    def evaluate(self, *batch):
        """`(loss, (nats, right))` of a batch's token ids, positions, targets and weights, without a step."""
        if self._evaluate is None:
            self._evaluate = jax.jit(self.loss)
        return self._evaluate(self.values, self.fixed, *batch)

    # Files ------------------------------------------------------------------------------------------------------

    def assign(self):
        """Writes the values into the model's variables."""
        for variable, value in zip(self.trainable, self.values, strict=True):
            variable.assign(jnp.copy(value.astype(variable.dtype)))

    def state(self):
        """dict of NumPy arrays to resume from: values in float32, moments in the upper half of their bits."""
        found = {f"value_{i}": np.asarray(x) for i, x in enumerate(self.values)}
        for number, moment in enumerate(self.moments):
            found |= {
                f"moment{number}_{i}": np.asarray(x.astype("bfloat16")).view("uint16") for i, x in enumerate(moment)
            }
        return found

    def load_state(self, found, steps):
        """Takes up what `state` returned after so many steps."""
        self.values = [jnp.asarray(found[f"value_{i}"]) for i in range(len(self.values))]
        for number, moment in enumerate(self.moments):
            bits = [np.asarray(found[f"moment{number}_{i}"], "uint32") << 16 for i in range(len(moment))]
            self.moments[number] = [jnp.asarray(part.view("float32")) for part in bits]
        self.steps = steps
