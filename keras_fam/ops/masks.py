"""Visibility: which query sees which key, from integer positions alone (Fig. 1, Alg. 1 and 2).

Every layout (whole blocks, a few tokens at any position, plots) computes the positions of its queries and keys and asks
the same three predicates. Positions count from the start of a block, so differences and block borders are what matters;
they may be NumPy arrays or tensors, of shapes that broadcast.
"""


def visible(query, key, *, block_size, memory_segments, attention_window=None, own_block=None):
    """Whether a token sees another: its own block up to itself, and the blocks before that stay visible.

    Args:
        query: int positions of queries.
        key: int positions of keys.
        block_size: S.
        memory_segments: m, previous blocks that a token sees.
        attention_window: None, or how many keys a token sees at most, itself included (plain sliding window,
            Transformer-XL).
        own_block: None, or the position at which the block of all queries begins, if that is known.

    Returns:
        bool, of the shape that `query` and `key` broadcast to.
    """
    own_block = query // block_size * block_size if own_block is None else own_block
    seen = (key <= query) & (key >= own_block - memory_segments * block_size)
    if attention_window is not None:
        seen = seen & (key > query - attention_window)
    return seen


def exists(key, block_index, block_size):
    """Whether the stream has a token at a position: none stands before its start.

    Args:
        key: int positions, counted from the start of the row's unfinished block.
        block_index: int32, blocks that the row completed before that one.
        block_size: S.
    """
    return key >= -block_size * block_index


def sink_visible(block, blocks_back):
    """Whether the first tokens of the stream, which stand in block 0, have left the window and are read as sinks.

    Args:
        block: int32, the block of the query.
        blocks_back: previous blocks that the query sees: m for tokens, 0 for memory rows.
    """
    return block > blocks_back


def memory_visible(count, age):
    """Whether a memory may be read.

    Args:
        count: int32, how many memories may be read in a block.
        age: int, memories that were written since; 0 is the newest.
    """
    return age < count
