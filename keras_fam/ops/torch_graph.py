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
import hashlib
import threading

import keras

# Calls of one kind before it is recorded, which takes as long as some hundred calls of one token, and as some thirty of
# many blocks (9 s for 18 layers on a CPU): those that read a short text alone are spared it.
WARMUP_CALLS, WARMUP_CALLS_LARGE = 8, 64
LARGEST = 1 << 23  # numbers in a tensor that is compared with others, to keep one of each

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
        _make_attributes_plain(graph)
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


def simplify(module, changing):
    """Computes now what does not change, and once what is computed several times; in place.

    Args:
        module: `torch.fx.GraphModule` of ATen operations.
        changing: `id`s of the tensors in it whose values may change between calls.
    """
    graph, known, seen, constants = module.graph, {}, {}, {}
    written, returned = _written(graph), set(graph.output_node().all_input_nodes)
    for node in list(graph.nodes):
        if node.op == "get_attr":
            tensor = _attribute(module, node.target)
            if id(tensor) not in changing and node not in written:
                known[node] = tensor
            elif seen.setdefault(node.target, node) is not node:
                node.replace_all_uses_with(seen[node.target])
            continue
        pure, inputs = node.op == "call_function" and _is_pure(node) and node not in written, node.all_input_nodes
        if pure and node not in returned and all(x in known for x in inputs):
            known[node] = _compute(node, known)
            continue
        _hold_constants(module, node, known, constants)
        if pure and not any(x in written for x in inputs):
            same = seen.setdefault((node.target, _hashable(node.args), _hashable(node.kwargs)), node)
            if same is not node:
                node.replace_all_uses_with(same)
    graph.eliminate_dead_code()
    for name, _ in list(module.named_buffers(recurse=False)):
        if not any(node.op == "get_attr" and node.target == name for node in graph.nodes):
            delattr(module, name)
    module.recompile()


def write_into_arguments(module):
    """Lets a graph write into an argument where it writes into a copy of one that nothing else reads; in place."""
    import torch

    graph = module.graph
    for node in list(graph.nodes):
        source = node.args[0] if node.target is torch.ops.aten.clone.default else None
        is_last = source is not None and source.op == "placeholder" and list(source.users) == [node]
        if is_last and any(_writes_into(user, node) for user in node.users):
            node.replace_all_uses_with(source)
            graph.erase_node(node)
    module.recompile()


def merge_views(module):
    """Makes each view of a view a view of the tensor itself, so that those between are not made; in place.

    Sizes, strides and offsets are those of the recording: a graph serves arguments that lie in memory in one way.
    """
    import torch

    graph, made = module.graph, {}
    arguments = graph.find_nodes(op="placeholder")
    for node in [node for node in graph.nodes if _is_view(node)]:
        source = next(x for x in _sharing(node) if not _is_view(x))
        value, whole = node.meta.get("val"), source.meta.get("val")
        if not isinstance(value, torch.Tensor) or not isinstance(whole, torch.Tensor) or value.dtype != whole.dtype:
            continue
        if all(_is_view(user) for user in node.users):
            continue
        place = (source, tuple(value.shape), value.stride(), value.storage_offset())
        if place not in made:
            with graph.inserting_after(arguments[-1] if source.op == "placeholder" else source):
                if source.op == "get_attr":  # made once: it shows what is later assigned to the variable
                    name, whole = f"_view_{len(made)}", _attribute(module, source.target).detach()
                    module.register_buffer(name, whole.as_strided(*place[1:]), persistent=False)
                    made[place] = graph.get_attr(name)
                else:
                    made[place] = graph.call_function(torch.ops.aten.as_strided.default, place)
        node.replace_all_uses_with(made[place], lambda user: not _is_view(user))
    graph.eliminate_dead_code()
    module.recompile()


def _is_view(node):
    """Whether a node is another view of its first argument's memory, or a list of such, or an item of such a list."""
    import torch

    if node.op != "call_function":
        return False
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return _is_view(node.args[0])
    if node.target is torch.ops.aten._unsafe_view.default:  # of a tensor that nothing else reads
        return True
    return not schema.is_mutable and any(part.alias_info is not None for part in schema.returns)


def _writes_into(user, node):
    schema = getattr(user.target, "_schema", None)
    return schema is not None and schema.is_mutable and user.args[0] is node


def _make_attributes_plain(module):
    """Lets Python find a module's tensors without the search through parameters and buffers."""
    for node in module.graph.find_nodes(op="get_attr"):
        if "." not in node.target:
            vars(module)[node.target] = getattr(module, node.target)


def _attribute(module, path):
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _written(graph):
    """Nodes whose tensors are written in place, with those that share their storage."""
    found = set()
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            continue
        for argument, given in zip(schema.arguments, node.args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                found.update(_sharing(given))
        found.add(node)
    return found


def _sharing(node):
    """A node and the ones that it is a view of."""
    while True:
        yield node
        schema = getattr(node.target, "_schema", None)
        written = schema is not None and schema.is_mutable
        if not (_is_view(node) or (written and any(part.alias_info is not None for part in schema.returns))):
            return
        node = node.args[0]


def _is_pure(node):
    import torch

    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return True  # an item of a list
    return not schema.is_mutable and torch.Tag.nondeterministic_seeded not in node.target.tags


def _compute(node, known):
    import torch

    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda x: known[x])
    return node.target(*args, **kwargs)


def _hashable(x):
    if isinstance(x, list | tuple):
        return tuple(map(_hashable, x))
    if isinstance(x, dict):
        return tuple((key, _hashable(value)) for key, value in sorted(x.items()))
    return (type(x), x) if not isinstance(x, slice) else (slice, x.start, x.stop, x.step)


def _hold_constants(module, node, known, constants):
    """Makes a node that is computed at every call read what is known as constants, one for equal ones."""
    import torch

    for source in node.all_input_nodes:
        tensor = known.get(source)
        if not isinstance(tensor, torch.Tensor):
            continue
        key = id(source)
        if tensor.numel() <= LARGEST:
            key = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device, _digest(tensor))
        if key not in constants:
            name = f"_known_{len(constants)}"
            module.register_buffer(name, tensor.detach(), persistent=False)
            with module.graph.inserting_before(node):
                constants[key] = module.graph.get_attr(name)
        node.replace_input_with(source, constants[key])


def _digest(tensor):
    """What tells a tensor's numbers from others, in few bytes."""
    import torch

    if not tensor.numel():
        return b""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(raw).digest()
