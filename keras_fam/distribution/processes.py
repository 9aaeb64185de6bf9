"""Rows of a state and positions of datasets, gathered from the processes that train together and handed out again."""

import keras
import numpy as np

from keras_fam.ops.processes import gather_arrays, gather_objects, process_shard, sees_all_rows, whole_value


def gather_rows(structure):
    """The rows of all processes: each tensor of a structure, such as a `StreamState`, as one NumPy array.

    All processes call it together, and each gets the whole.

    ```python
    state = keras_fam.distribution.gather_rows(stream.state)    # leading axis: rows of all processes, in their order
    ```

    Args:
        structure: tensors or arrays `[B, ...]`, B the rows of this process (on JAX, of all processes).

    Returns:
        The structure, with NumPy arrays `[B · processes, ...]` (on JAX `[B, ...]`).
    """
    if sees_all_rows():
        return keras.tree.map_structure(whole_value, structure)

    leaves = [whole_value(x) for x in keras.tree.flatten(structure)]
    if not leaves:
        return structure
    data = b"".join(np.ascontiguousarray(x).tobytes() for x in leaves)  # one message for all of them
    parts, whole, start = gather_arrays(np.frombuffer(data, "uint8")), [], 0
    for x in leaves:
        of_each = parts[:, start : start + x.nbytes]
        whole.append(np.concatenate([np.frombuffer(part.tobytes(), x.dtype).reshape(x.shape) for part in of_each]))
        start += x.nbytes
    return keras.tree.pack_sequence_as(structure, whole)


def own_rows(structure):
    """The part of `gather_rows` that belongs to this process; without communication.

    Args:
        structure: arrays `[rows, ...]`, the rows of all processes.

    Returns:
        The structure, with arrays `[rows / processes, ...]`; unchanged on JAX, whose programs see all rows.

    Raises:
        ValueError: if the processes do not divide the rows.
    """
    index, count = process_shard()
    if sees_all_rows() or count == 1:
        return structure

    def part(x):
        if len(x) % count:
            raise ValueError(
                f"Each process has the same number of rows; received {len(x)} rows for {count} processes. Use a number "
                "of processes that divides the rows."
            )
        size = len(x) // count
        return x[index * size : (index + 1) * size]

    return keras.tree.map_structure(part, structure)


def gather_position(dataset, batches=0):
    """The position of a `keras_fam.data` dataset whose shards the processes read, as that of one whole dataset.

    All processes call it together. `load_state_dict` of a shard takes its part of such a position, however many shards
    there are then.

    Args:
        dataset: a `ResumableDataset`.
        batches: as in `ResumableDataset.state_dict`.

    Returns:
        A dict that JSON can hold.
    """
    return type(dataset).merge_states(gather_objects(dataset.state_dict(batches)))


def agree_on_file(exists, path):
    """`exists`, which has to be the same in all processes; ValueError otherwise."""
    found = np.array(gather_objects(bool(exists)))
    if found.any() != found.all():
        raise ValueError(
            f"All processes resume from one file; {path} exists in processes {np.flatnonzero(found).tolist()} only. "
            "Put it in a folder that all machines share, or copy it to each."
        )
    return exists
