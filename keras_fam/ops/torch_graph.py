"""torch: a step that is called again and again runs from a recorded graph.

A one-token step is some hundred small operations a layer, and what Keras does around each of them costs several times
what the operation itself does. JAX and TensorFlow compile that away. Here, a step's own operations are recorded once
(`make_fx`), what never changes is computed once, what several layers compute is computed in one of them, and the rest
is called as it is: the same operations on the same numbers.

A branch on values can't be recorded. `branch` (in `scan.py`) then takes its false side and hands in the predicate; a
call for which one of them holds is computed eagerly. In decoding that is one call per block.
"""

import collections
import contextlib
import threading

import keras

from keras_fam.ops.torch_passes import call_directly, make_attributes_plain, merge_views, simplify, write_into_arguments

# Calls of one kind before it is recorded, which takes as long as some hundred calls of one token, and as some thirty of
# many blocks (9 s for 18 layers on a CPU): those that read a short text alone are spared it.
WARMUP_CALLS, WARMUP_CALLS_LARGE = 8, 64

_local = threading.local()
_recording = threading.Lock()  # torch patches its modules while it traces: one thread at a time


def is_tracing():
    """Whether this thread records: values can't be read."""
    return getattr(_local, "predicates", None) is not None


def assume_false(predicate):
    """Notes the predicate of a branch, a bool scalar, whose false side is recorded."""
    _local.predicates.append(predicate)


@contextlib.contextmanager
def _predicates():
    _local.predicates = []
    try:
        yield _local.predicates
    finally:
        _local.predicates = None


class TracedFunction:
    """A function of structures of tensors that runs from a graph, one per shapes and dtypes, after a few calls.

    What cannot be traced (values that are read, random numbers drawn) runs eagerly.

    Args:
        function: function of structures of tensors with a structure of tensors as result, without effects.
        variables: the `keras.Variable`s that it reads; they may be assigned to, but not replaced.
        calls_before: how many calls of one kind run as they are.
        in_place: whether a graph may write into its arguments where the function makes a changed copy of one.
    """

    def __init__(self, function, variables, calls_before=WARMUP_CALLS, *, in_place=False):
        self.function, self.variables, self.graphs, self.in_place = function, variables, {}, in_place
        self.calls_before, self.calls = calls_before, collections.Counter()

    def __call__(self, *args):
        import torch

        leaves = keras.tree.flatten(args)
        if is_tracing() or not all(type(x) in (torch.Tensor, torch.nn.Parameter) for x in leaves):
            return self.function(*args)  # inside of another recording, or of an export
        kind = self._kind_of_flat(leaves)
        found = self.graphs.get(kind)
        if found is None:
            self.calls[kind] += 1
            if self.calls[kind] >= self.calls_before:
                with _recording:
                    if kind not in self.graphs:
                        self.graphs[kind] = self._record(args, leaves)
            return self.function(*args)
        if not found:
            return self.function(*args)
        graph, structure = found
        outputs, wrong = graph.forward(*leaves)
        if wrong is not None and bool(wrong):
            return self.function(*args)
        return keras.tree.pack_sequence_as(structure, outputs)

    @staticmethod
    def _kind_of_flat(leaves):
        return tuple((x.shape, x.stride(), x.storage_offset(), x.dtype, x.device) for x in leaves)

    def _record(self, args, leaves):
        """`(graph, structure of the result)`, or () for a function that can't be recorded."""
        import torch
        from torch.fx.experimental.proxy_tensor import make_fx

        structure = None

        def flat(*leaves):
            nonlocal structure
            predicates.clear()
            result = self.function(*keras.tree.pack_sequence_as(args, list(leaves)))
            structure = keras.tree.map_structure(lambda x: 0, result)
            return keras.tree.flatten(result), torch.stack(predicates).any() if predicates else None

        try:
            with _predicates() as predicates:  # fake tensors have no values: nothing can be read of them and kept
                graph = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*leaves)
        except Exception:  # whatever torch can't record: the function is right, as its calls so far have shown
            return ()
        simplify(graph, {id(variable.value) for variable in self.variables})
        if self.in_place:
            write_into_arguments(graph)
        merge_views(graph)
        call_directly(graph)
        make_attributes_plain(graph)
        return graph, structure

    def recorded(self, leaves):
        """The graph for such arguments, a function of the flat ones that returns the flat result.

        None if there is none, or if a branch was left out of it.
        """
        found = self.graphs.get(self._kind_of_flat(leaves))
        if not found or found[0].graph.output_node().args[0][1] is not None:
            return None
        run = found[0].forward
        return lambda leaves: run(*leaves)[0]
