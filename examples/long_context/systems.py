"""Models that read a text and complete it: with a memory, with that memory ablated, and without one.

A text with memory is read once, as it is. Its last `tail` blocks are then read several times over, each time with
another memory in the place of its own, before every block: so late an ablation leaves what tokens before took from the
memory, and `tail` blocks later little of that is left in the window. The other memories are those that the undisturbed
streams have at the same block.
"""

import contextlib

import numpy as np
from keras import ops

from keras_fam.evaluation import TextScorer
from keras_fam.evaluation.ablation import MEMORY_FIELDS, layers_of

FAM, CLOSED, ZEROED, OTHER, AGO = "FAM", "FAM, gate closed", "FAM, zeroed", "FAM, another text's", "FAM, 8 blocks ago"
MEMORY_SYSTEMS = (FAM, CLOSED, ZEROED, OTHER, AGO)
DELAY = 8  # blocks
CLOSED_BIAS = -1e9  # e to this power is 0; −∞ itself times 0 is not a number


class Systems:
    """Completes texts with each of several systems.

    Args:
        models: dict from a name to a `TransformerFAMCausalLM`; `"FAM"` is the one with memory.
        rows: int, texts that are read at once; at least two, so that there is another text's memory.
        tail: int, blocks at the end in which the memory is ablated.
        tokenizer: None (that of the model), or see `TextScorer`.
        blocks_per_step: int, blocks that are read at once.
    """

    def __init__(self, models, rows, tail=32, tokenizer=None, blocks_per_step=8):
        if rows < 2:
            raise ValueError(f"`rows` must be at least 2, for another text's memory. Received: {rows}")
        options = {"tokenizer": tokenizer, "blocks_per_step": blocks_per_step}
        self.scorers = {name: TextScorer(model, rows, **options) for name, model in models.items()}
        self.rows, self.tail = rows, tail

    @property
    def names(self):
        """Names of all systems, a list of str; a model whose memory has no gate cannot close it."""
        fam = self.scorers.get(FAM)
        names = [name for name in self.scorers if name != FAM]
        if fam is not None:
            names += [name for name in MEMORY_SYSTEMS if name != CLOSED or gates(fam.model)]
        return names

    def complete(self, texts, new_tokens, names=None):
        """Completions of texts by every system.

        Args:
            texts: list of `rows` int `[T]` arrays, all different.
            new_tokens: int, tokens of a completion at most.
            names: None (all), or the names of systems.

        Returns:
            dict from each name to a list of str.
        """
        names, found = self.names if names is None else names, {}
        for name in (name for name in names if name not in MEMORY_SYSTEMS):
            scorer = self.scorers[name]
            state = scorer.read([ids[:-1] for ids in texts])
            found[name] = self._finish(scorer, state, texts, new_tokens)
        wanted = [name for name in names if name in MEMORY_SYSTEMS]
        if wanted:
            found |= self._with_memory(texts, new_tokens, wanted)
        return found

    def _finish(self, scorer, state, texts, new_tokens):
        return scorer.complete(state, [ids[-1] for ids in texts], self.rows, (), new_tokens)

    def _with_memory(self, texts, new_tokens, names):
        scorer = self.scorers[FAM]
        size, reader = scorer.model.block_size, scorer.reader
        blocks = [(len(ids) - 1) // size for ids in texts]
        tail = min(self.tail, *blocks)
        heads = [(count - tail) * size for count in blocks]
        start = reader.read(
            [ids[:head] for ids, head in zip(texts, heads, strict=True)], scorer.model.get_initial_state(self.rows)
        )

        def read(state, replaced):
            """The state before the last token; `replaced(state, j)` has the memory that block j of the tail reads."""
            for j in range(tail + 1):
                state = replaced(state, j)
                last = j == tail
                rows = [
                    ids[head + j * size : len(ids) - 1 if last else head + (j + 1) * size]
                    for ids, head in zip(texts, heads, strict=True)
                ]
                state = reader.read(rows, state)
            return state

        memories, found = [], {}

        def noted(state, j):
            memories.append(memory_of(state))
            return state

        after = read(start, noted)
        ways = {
            ZEROED: lambda state, j: with_memory(state, _map(ops.zeros_like, memories[j])),
            OTHER: lambda state, j: with_memory(state, _map(lambda x: ops.roll(x, 1, axis=0), memories[j])),
            AGO: lambda state, j: with_memory(state, memories[max(j - DELAY, 0)]),
        }
        for name in names:
            if name == FAM:
                found[name] = self._finish(scorer, after, texts, new_tokens)
            elif name == CLOSED:
                with closed_gates(scorer.model):
                    state = read(start, lambda state, j: state)
                    found[name] = self._finish(scorer, state, texts, new_tokens)
            else:
                found[name] = self._finish(scorer, read(start, ways[name]), texts, new_tokens)
        return found


def memory_of(state):
    """The memories of all layers: for each, a tuple of tensors, one for each of `MEMORY_FIELDS`."""
    return [tuple(getattr(layer, name) for name in MEMORY_FIELDS) for layer in state.layers]


def with_memory(state, memory):
    """A state with other memories."""
    layers = [
        layer._replace(**dict(zip(MEMORY_FIELDS, fields, strict=True)))
        for layer, fields in zip(state.layers, memory, strict=True)
    ]
    return state._replace(layers=tuple(layers))


def _map(function, memory):
    return [tuple(x if isinstance(x, tuple) else function(x) for x in fields) for fields in memory]


def gates(model):
    """The variables of the bias on reading the memory."""
    return [variable for layer in layers_of(model) for variable in layer.weights if variable.name == "fam_gate"]


@contextlib.contextmanager
def closed_gates(model):
    """Inside, tokens read no memory: the bias on reading it is so low that no weight is left."""
    variables = gates(model)
    kept = [ops.convert_to_numpy(variable.value) for variable in variables]
    for variable in variables:
        variable.assign(np.full(variable.shape, CLOSED_BIAS))
    try:
        yield
    finally:
        for variable, value in zip(variables, kept, strict=True):
            variable.assign(value)
