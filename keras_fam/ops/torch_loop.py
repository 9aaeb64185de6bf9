"""torch: one step again and again over tensors that stay where they are, on a GPU as captured CUDA graphs.

A step of a decoded token is a recorded graph (`torch_graph.py`) that writes new keys into the state's own buffers. On a
GPU, launching its kernels one by one takes longer than running them: there, several steps are captured as one CUDA
graph and launched at once. What a launch reads and writes, random seeds and the rows that go on included, lies in the
loop's own tensors, so that nothing passes through the host between two tokens.
"""

import contextlib
import threading

import keras

TOKENS_PER_LAUNCH = 16  # on a GPU; a power of two


class TokenLoop:
    """Steps over one set of tensors, for one call at a time.

    Args:
        step_of: function of a kind (any hashable), called once per kind; returns `step(*carry)`, which returns
            `(output, carry)`: a tensor, and a tuple with the structure, shapes and dtypes of the carry. A step may
            write into the tensors of the carry that it gets.
        capture: None, or function of a function without arguments that calls steps; returns a function that does the
            same to the same tensors, and returns the same outputs.
        tokens_per_launch: how many steps a launch has at most, a power of two.
        copy: None, or function of a tensor that returns a copy of it, laid in memory as steps read it best.
    """

    def __init__(self, step_of, *, capture=None, tokens_per_launch=1, copy=None):
        self._step_of, self._capture, self.tokens_per_launch = step_of, capture, tokens_per_launch
        self._copy = copy or _in_order
        self._steps, self._recorded, self._launches = {}, {}, {}
        self._kinds, self._held, self._structure = [], [], None
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def holding(self, carry):
        """Inside, in one thread at a time, steps go on from a copy of `carry`."""
        import torch

        with self._lock, torch.no_grad():
            leaves = keras.tree.flatten(carry)
            kinds = [(x.shape, x.dtype, x.device) for x in leaves]
            if kinds != self._kinds:
                self._kinds, self._held, self._recorded, self._launches = kinds, [], {}, {}
            if not self._held:
                self._held = [self._copy(x.detach()) for x in leaves]
                self._structure = keras.tree.map_structure(lambda x: 0, carry)
            else:
                for held, given in zip(self._held, leaves, strict=True):
                    held.copy_(given)
            yield

    def launch(self, kind, count):
        """`count` steps of a kind: a list of their outputs, whose values the next launch may overwrite."""
        if self._capture is None:
            return self._run(kind, count)
        if (kind, count) not in self._launches:
            if not self._is_recorded(kind):  # it is captured as a graph or not at all
                return self._run(kind, count)
            self._launches[kind, count] = self._captured(kind, count)
        return self._launches[kind, count]()

    def carry(self):
        """The carry after the last launch, which ends the steps of this call."""
        leaves = self._held
        if self._capture is None:  # nothing else knows these tensors
            self._held = []
        else:
            leaves = [x.clone() for x in leaves]
        return keras.tree.pack_sequence_as(self._structure, leaves)

    def _step(self, kind):
        if kind not in self._steps:
            self._steps[kind] = self._step_of(kind)
        return self._steps[kind]

    def _is_recorded(self, kind):
        graphs = getattr(self._step(kind), "graphs", None)
        return graphs is None or any(graphs.values())

    def _captured(self, kind, count):
        """A captured launch, or the steps one by one if they can't be captured."""
        before = [x.clone() for x in self._held]  # a capture needs steps that were run
        try:
            return self._capture(lambda: self._run(kind, count))
        except RuntimeError:
            return lambda: self._run(kind, count)
        finally:
            for held, value in zip(self._held, before, strict=True):
                held.copy_(value)

    def _run(self, kind, count):
        recorded = self._recorded.get(kind) or self._find_recorded(kind)
        if recorded is None:
            return self._run_as_it_is(kind, count)
        run, moved = recorded
        outputs = []
        for _ in range(count):
            output, *leaves = run(self._held)
            for i in moved:  # most leaves were written where they lie
                self._held[i].copy_(leaves[i])
            outputs.append(output)
        return outputs

    def _run_as_it_is(self, kind, count):
        step, outputs = self._step(kind), []
        for _ in range(count):
            output, carry = step(*keras.tree.pack_sequence_as(self._structure, self._held))
            moved = self._moved(keras.tree.flatten(carry))
            for held, new in moved:
                held.copy_(new)
            outputs.append(output)
        return outputs

    def _find_recorded(self, kind):
        """The graph of a step that was recorded, and which of its results have to be moved into their places."""
        step = self._step(kind)
        run = step.recorded(self._held) if hasattr(step, "recorded") else None
        if run is None:
            return None
        before = [x.clone() for x in self._held]
        _, *leaves = run(self._held)
        moved = [i for i, held in enumerate(self._held) if not _is_same(held, leaves[i])]
        own = {held.untyped_storage().data_ptr() for held in self._held}
        safe = not any(leaves[i].untyped_storage().data_ptr() in own for i in moved)
        for held, value in zip(self._held, before, strict=True):
            held.copy_(value)
        if not safe:  # a result that shows another argument has to be copied before that is written
            return None
        self._recorded[kind] = run, moved
        return run, moved

    def _moved(self, leaves):
        """Pairs of held tensors and new values that do not lie in their places."""
        moved = [(held, new) for held, new in zip(self._held, leaves, strict=True) if not _is_same(held, new)]
        own = {held.untyped_storage().data_ptr() for held in self._held}
        return [(held, new.clone() if new.untyped_storage().data_ptr() in own else new) for held, new in moved]


def _in_order(x):
    """A copy whose last axis is contiguous, and so on."""
    import torch

    return x.clone(memory_format=torch.contiguous_format)


def heads_first(x):
    """A copy; of keys or values `[B, rows, N, H]` one in which the rows of a head lie together in memory.

    On a CPU, products of one query with the keys of a head then take a third to a half of the time.
    """
    return _in_order(x.transpose(1, 2)).transpose(1, 2) if x.ndim == 4 else _in_order(x)


def _is_same(a, b):
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())


def capture_cuda_graph(run):
    """A CUDA graph of the kernels of `run()`, which is called several times: a function that launches it."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries make their workspaces before the capture
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()

    def replay():
        graph.replay()
        return outputs

    return replay
