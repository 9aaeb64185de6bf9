"""Projecting memory rows: a scan step is short, so all that can be prepared once per call is prepared."""

from keras import ops

from keras_fam.distribution.state_sharding import weights_are_divided
from keras_fam.layers.fast_call import cast, frozen_kernel, has_lora, is_plain, lora_update, run
from keras_fam.ops.rope import rotate_whole


class MemoryProjection:
    """Queries, keys and values of memory rows, with one product and one rotation for all.

    Joined kernels and tables are tensors of the call in which the object is made: it does not outlive it.

    Args:
        layer: a `FeedbackAttention`.
        with_query: whether queries are wanted (not where other rows write the memory, see `WritingRows`).
    """

    def __init__(self, layer, with_query):
        self.layer, self.with_query = layer, with_query
        parts = [layer.query] * with_query + [layer.key, layer.value]
        self.joined = all(map(is_plain, parts)) and not weights_are_divided()
        if not self.joined:
            return
        self.heads = (layer.num_query_heads if with_query else 0, layer.num_key_value_heads)
        kernels = [frozen_kernel(part) for part in parts]
        self.kernel = ops.concatenate([ops.reshape(k, (k.shape[0], -1)) for k in kernels], axis=1)
        self.parts = [(part, k.shape[1] * k.shape[2]) for part, k in zip(parts, kernels, strict=True)]
        self.bias = None
        if layer.use_attention_bias:
            self.bias = ops.concatenate([ops.reshape(ops.convert_to_tensor(p.bias), (-1,)) for p in parts])
        tables = layer.positions.memory_heads(*self.heads, layer.query_scale)
        self.table = tuple(None if table is None else ops.convert_to_tensor(table) for table in tables)

    def __call__(self, normed):
        """Rotated, scaled queries `[B, F, N, H]` (None without), rotated keys and values `[B, F, K, H]`.

        Args:
            normed: `[B, F, D]`, normed memory rows.
        """
        layer = self.layer
        if not self.joined:
            query = layer.memory_query(normed) if self.with_query else None
            return query, *layer.memory_key_value(normed)
        queries, keys = self.heads
        rows = cast(ops.reshape(normed, (-1, normed.shape[-1])), layer.compute_dtype)
        rows = self._with_lora(rows, ops.matmul(rows, self.kernel))
        rows = rows if self.bias is None else rows + self.bias
        rows = ops.reshape(rows, (-1, layer.fam_length, queries + 2 * keys, layer.head_dim))
        turned, value = rows[:, :, : queries + keys], rows[:, :, queries + keys :]
        if layer.key_norm is not None:
            key = run(layer.key_norm, turned[:, :, queries:])
            turned = ops.concatenate([run(layer.query_norm, turned[:, :, :queries]), key], axis=2) if queries else key
        turned = rotate_whole(turned, self.table)
        return (turned[:, :, :queries] if queries else None), turned[:, :, queries:], value

    def _with_lora(self, rows, product):
        """The joined product `[R, (N + 2K)·H]` with what LoRA adds to it."""
        if not any(has_lora(part) for part, _ in self.parts):
            return product
        none = ops.zeros_like(product[:, :1])
        updates = [
            lora_update(part, rows) if has_lora(part) else ops.repeat(none, width, axis=1) for part, width in self.parts
        ]
        return product + ops.concatenate(updates, axis=1)
