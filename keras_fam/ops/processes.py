"""Several processes that train one model: whose rows are whose, and what they tell one another.

Three engines, two ways. Under `keras.distribution` on JAX, a program sees the rows of all processes, and nothing has to
be told. With a process group of torch, and in a replica of a `tf.distribute` strategy, each sees rows of its own.
Every function here that speaks with other processes is called by all of them, in the same order.
"""

import contextlib
import json

import keras
import numpy as np
from keras import ops

_apart = False  # torch: whether the processes of the default group train models of their own


@contextlib.contextmanager
def independent_processes():
    """Within it, the processes of torch's default group train models of their own and tell each other nothing.

    For a process group that serves another purpose, such as trials of hyperparameters.
    """
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


def process_shard():
    """`(index, count)`: which of the processes that train together this one is.

    JAX: as `jax.distributed` (`keras.distribution.initialize`) numbers them. PyTorch: the rank in the default process
    group. TensorFlow: the worker of the `MultiWorkerMirroredStrategy` whose scope is entered. Otherwise `(0, 1)`.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.process_index(), jax.process_count()
    if backend == "tensorflow":
        strategy = _strategy()
        if _num_workers(strategy) == 1:
            return 0, 1
        resolver = strategy.cluster_resolver
        chief = len(resolver.cluster_spec().as_dict().get("chief", ()))
        return resolver.task_id + (chief if resolver.task_type == "worker" else 0), _num_workers(strategy)
    group = _torch_group()
    return (0, 1) if group is None else (group.get_rank(), group.get_world_size())


def row_shard():
    """`(index, count)`: which part of a step's rows this program sees; rows of part 0 come first.

    `index` is a tensor in a compiled step of TensorFlow. `(0, 1)` on JAX, whose programs see all rows.
    """
    backend = keras.backend.backend()
    if backend == "torch":
        return process_shard()
    if backend == "tensorflow":
        import tensorflow as tf

        if tf.distribute.has_strategy() and not tf.distribute.in_cross_replica_context():
            context = tf.distribute.get_replica_context()
            return context.replica_id_in_sync_group, context.num_replicas_in_sync
    return 0, 1


def sees_all_rows():
    """Whether programs see the rows of all processes (JAX)."""
    return keras.backend.backend() == "jax"


def from_first(tensors):
    """The `tensors` (a list) of the program that sees row 0, in every program of a step."""
    index, count = row_shard()
    if count == 1:
        return tensors
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        def of_first(x):
            whole = tf.cast(x, "int32" if x.dtype.is_bool else x.dtype)
            told = tf.where(tf.equal(index, 0), whole, tf.zeros_like(whole))
            return tf.cast(tf.distribute.get_replica_context().all_reduce("SUM", told), x.dtype)

        return [of_first(x) for x in tensors]
    return [_torch_broadcast(x) for x in tensors]


def agree(variables):
    """Gives `variables` the values that they have in process 0, where nothing else keeps them equal (torch)."""
    if keras.backend.backend() == "torch" and row_shard()[1] > 1:
        for variable in variables:
            variable.assign(_torch_broadcast(variable.value))


@contextlib.contextmanager
def mean_of_gradients(optimizer):
    """Within it, a Keras `optimizer` applies the means of all processes' gradients (torch; other engines do so anyway).

    A gradient that no process has stays None; where some have none, theirs counts as 0.
    """
    if keras.backend.backend() != "torch" or optimizer is None or process_shard()[1] == 1:
        yield
        return

    def apply(gradients, trainable_variables=None):
        return type(optimizer).apply(optimizer, _torch_means(gradients, trainable_variables), trainable_variables)

    vars(optimizer)["apply"] = apply
    try:
        yield
    finally:
        del vars(optimizer)["apply"]


def mean_of_metrics(metrics):
    """Means over all processes of a dict of metrics, which are means of equally many rows each (torch)."""
    _, count = process_shard()
    if keras.backend.backend() != "torch" or count == 1 or not metrics:
        return metrics
    import torch

    values = torch.stack([torch.as_tensor(x, dtype=torch.float64) for x in metrics.values()]).to(_torch_device())
    torch.distributed.all_reduce(values)
    return dict(zip(metrics, (values / count).float().cpu(), strict=True))


def whole_value(x):
    """The value of a tensor as a NumPy array, all of it, though parts of it may lie on devices of other processes."""
    if keras.backend.backend() == "jax" and not getattr(x, "is_fully_addressable", True):
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return ops.convert_to_numpy(x.read_value() if hasattr(x, "read_value") else x)  # a variable of a strategy


def sum_of_processes(array):
    """The sum of a NumPy array over all processes, where each counts its own rows (torch); else the array."""
    return gather_arrays(array).sum(axis=0) if keras.backend.backend() == "torch" else array


def share_of_process(array):
    """An equal share of a sum over all processes, where each counts its own rows (torch); else the array."""
    return array / process_shard()[1] if keras.backend.backend() == "torch" else array


def gather_arrays(array):
    """`[count, ...]`: a NumPy array of each process, in their order; all have one shape and dtype."""
    _, count = process_shard()
    if count == 1:
        return array[None]
    backend = keras.backend.backend()
    if backend == "jax":
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(array))
    data = np.frombuffer(np.ascontiguousarray(array).tobytes(), "uint8")
    if backend == "tensorflow":
        import tensorflow as tf

        codes = tf.constant(data.astype("int32")[None])
        found = _strategy().gather(codes, axis=0).numpy().astype("uint8")
    else:
        import torch

        own = torch.from_numpy(data.copy()).to(_torch_device())
        parts = [torch.empty_like(own) for _ in range(count)]
        torch.distributed.all_gather(parts, own)
        found = np.stack([part.cpu().numpy() for part in parts])
    return np.stack([np.frombuffer(part.tobytes(), array.dtype).reshape(array.shape) for part in found])


def gather_objects(value):
    """A list of what each process passes, anything that JSON can hold, in the order of processes."""
    if process_shard()[1] == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), "uint8")
    lengths = gather_arrays(np.array([len(data)], "int32"))[:, 0]
    padded = np.zeros(int(lengths.max()), "uint8")
    padded[: len(data)] = data
    found = gather_arrays(padded)
    return [json.loads(part[:length].tobytes()) for part, length in zip(found, lengths, strict=True)]


def in_first_process(function):
    """Calls `function()` in process 0. No process goes on before that; where it raises, the others get OSError."""
    failed = None
    if process_shard()[0] == 0:
        try:
            function()
        except Exception as error:  # told to the others, which wait here
            failed = error
    message = gather_objects(None if failed is None else f"{type(failed).__name__}: {failed}")[0]
    if failed is not None:
        raise failed
    if message is not None:
        raise OSError(f"Process 0 could not write. {message}")


# TensorFlow: what Keras' `fit` lacks for several workers ---------------------------------------------------------


def scope_of(model):
    """The scope of the strategy that `model` was made in; elsewhere a context without effect."""
    if keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    return model.distribute_strategy.scope()


def has_many_workers(model):
    """Whether `model` was made in the scope of a `MultiWorkerMirroredStrategy` with several workers."""
    return keras.backend.backend() == "tensorflow" and _num_workers(model.distribute_strategy) > 1


def replicas_here(model):
    """How many replicas `model` has in this process: more than one in the scope of a `MirroredStrategy`."""
    if keras.backend.backend() != "tensorflow":
        return 1
    strategy = model.distribute_strategy
    return strategy.num_replicas_in_sync // _num_workers(strategy)


def for_worker(dataset, model):
    """`dataset` as `fit` of `model` reads it: as this worker's own batches, where there are several workers."""
    if not has_many_workers(model) or not hasattr(dataset, "to_tf_dataset"):
        return dataset
    return model.distribute_strategy.distribute_datasets_from_function(lambda _: dataset.to_tf_dataset())


def first_batch(iterator, model):
    """The first batch that an epoch iterator of Keras gives this worker."""
    local = model.distribute_strategy.experimental_local_results
    _, _, batches = next(iter(iterator))
    return keras.tree.map_structure(lambda x: local(x)[0], next(batches))


# Helpers ----------------------------------------------------------------------------------------------------------


def _strategy():
    import tensorflow as tf

    return tf.distribute.get_strategy()


def _num_workers(strategy):
    return getattr(strategy.extended, "_num_workers", 1)


def _torch_group():
    """The default process group, if several processes of it train together; else None."""
    import torch

    distributed = torch.distributed
    if _apart or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed if distributed.get_world_size() > 1 else None


def _torch_device():
    """Where collectives take their tensors from: nccl has none on the CPU."""
    import torch

    return "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"


def _torch_broadcast(x):
    """`x` of process 0; `x` itself while Keras works out shapes on the meta device."""
    import torch

    if x.device.type == "meta":
        return x
    told = x.detach().to(torch.uint8 if x.dtype == torch.bool else x.dtype).clone().contiguous()
    torch.distributed.broadcast(told, src=0)
    return told.to(x.dtype)


def _torch_means(gradients, variables):
    """Means of gradients over all processes, in one message for each dtype; None where it is None in all of them."""
    import torch

    _, count = process_shard()
    known = torch.tensor([g is not None for g in gradients], dtype=torch.int32, device=_torch_device())
    torch.distributed.all_reduce(known)
    means, by_dtype = list(gradients), {}
    for i, number in enumerate(known.tolist()):
        if number:
            means[i] = torch.zeros_like(variables[i].value) if gradients[i] is None else gradients[i]
            by_dtype.setdefault(means[i].dtype, []).append(i)
    for group in by_dtype.values():
        flat = torch.cat([means[i].detach().reshape(-1) for i in group])
        torch.distributed.all_reduce(flat)
        parts = torch.split(flat / count, [means[i].numel() for i in group])
        for i, part in zip(group, parts, strict=True):
            means[i] = part.reshape(means[i].shape)
    return means
