"""torch: what is done to a recorded graph (`torch_graph.py`) so that it runs with fewer and cheaper calls."""

import hashlib

LARGEST = 1 << 23  # numbers in a tensor that is compared with others, to keep one of each
# ATen operations whose arguments are those of the function, or method, of the same name.
DIRECT = {
    *("add", "sub", "mul", "div", "neg", "pow", "rsqrt", "mean", "sum", "exp", "silu", "mm", "bmm", "addmm"),
    *("add_", "mul_", "div_", "index_put_", "where", "lt", "le", "gt", "ge", "eq", "logical_and", "logical_not"),
    *("bitwise_and", "clamp", "argmax", "embedding", "cat", "stack", "roll", "clone", "as_strided", "_softmax"),
}


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


def call_directly(module):
    """Calls the operations in `DIRECT` by PyTorch's own functions, which take 1 to 3 µs less a call; in place.

    This comes last: what other passes ask of an operation, these functions do not tell.
    """
    import torch

    places = (torch, torch.Tensor, torch._C._nn)
    for node in module.graph.nodes:
        name = getattr(getattr(node.target, "overloadpacket", None), "__name__", None)
        if name in DIRECT and node.target.namespace == "aten":
            node.target = next(getattr(place, name) for place in places if hasattr(place, name))
    module.recompile()


def make_attributes_plain(module):
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
