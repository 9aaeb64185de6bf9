"""`Chunk`: how the tokens of one call lie in blocks. It is made once per call and handed to every layer."""

from typing import Any, NamedTuple

from keras import ops

from keras_fam.ops import ragged
from keras_fam.ops.backend import indices
from keras_fam.ops.scan import branch

ALIGNMENTS = ("initial", "block", "unaligned")


class Chunk(NamedTuple):
    """How the tokens of a call lie in blocks. Sizes are ints, unless T is known at run time only (a tensor on
    TensorFlow, a symbol in an export from JAX).

    Attributes:
        block_size: S.
        alignment: what is known when the program is made. `"initial"`: every row is at the start of its stream;
            `"block"`: every row with tokens is at the start of a block; `"unaligned"`: rows may be anywhere.
        length: T, the number of tokens.
        lengths: None, or int32 `[B]`, how many of the T tokens exist in each row.
        keep_state: whether the state after the tokens is wanted.
        positional: whether the tokens are so few that they are attended to by position, without filling blocks.
        num_blocks: n, blocks that the tokens may touch.
        num_updates: how many of them may be completed, and their memory be of use.
        position: int32 `[T]` or `[B, T]`, positions of the tokens, counted from the start of the row's first block.
        completed: int32 `[B]` (or `[1]`), how many blocks each row completes.
        completes: of a chunk within one block: None, or whether some row completes it, where that is known when the
            program is made.
    """

    block_size: int
    alignment: str
    length: Any
    lengths: Any
    keep_state: bool
    positional: bool
    num_blocks: Any
    num_updates: Any
    position: Any
    completed: Any
    completes: bool | None = None

    @property
    def aligned(self):
        """Whether every row with tokens is at the start of a block."""
        return self.alignment != "unaligned"

    @property
    def uniform(self):
        """Whether all rows complete the same blocks, all of them known when the program is made."""
        return self.aligned and self.lengths is None and isinstance(self.length, int)

    @property
    def one_block(self):
        """Whether the chunk lies within one block, as in decoding: mostly, no block is completed."""
        return self.positional and self.num_blocks == 1

    @property
    def some_row_completes(self):
        """bool scalar: whether the block of some row is complete after the chunk."""
        return ops.any(self.completed > 0)

    def known(self, completes):
        """The chunk, of one block, in a program for calls in which some row completes it (True), or none does."""
        completed = self.completed if completes else ops.zeros(ops.shape(self.completed), "int32")
        return self._replace(completes=completes, completed=completed)

    def on_completion(self, some, none):
        """`some()` if a row completes its block with this chunk, of one block, else `none()`; only one is computed."""
        if self.completes is None:
            return branch(self.some_row_completes, some, none)
        return some() if self.completes else none()

    @property
    def taken(self):
        """int or int32 `[B]`, how many tokens each row reads."""
        return self.length if self.lengths is None else self.lengths

    @property
    def block_offsets(self):
        """int32 `[n]`: 0, 1, … of the blocks of the call."""
        return indices(self.num_blocks)

    def visible_segments(self, memory_segments):
        """How many previous blocks the tokens of the call can see, at most `memory_segments`."""
        if self.alignment == "initial" and isinstance(self.num_blocks, int):
            return min(memory_segments, self.num_blocks - 1)
        return memory_segments

    def zero_padding(self, x):
        """`x` `[B, T, …]` with zeros behind each row's length."""
        if self.lengths is None:
            return x
        return ragged.zero_rows(x, indices(self.length) < ops.expand_dims(self.lengths, 1))


def make_chunk(x, position, block_size, alignment, *, lengths=None, keep_state=True):
    """The `Chunk` of tokens `x` `[B, T, …]`.

    Args:
        x: the tokens.
        position: `StreamPosition` before them, of B rows, or of one row that stands for all.
        block_size: S.
        alignment: see `Chunk`.
        lengths: None, or int32 `[B]`.
        keep_state: False leaves out what only the next call would need.
    """
    S, length = block_size, ops.shape(x)[1]
    static, aligned = isinstance(length, int), alignment != "unaligned"
    place = indices(length)
    if aligned:
        num_blocks, num_updates = (length + S - 1) // S, length // S
    else:
        num_blocks, num_updates = (length + 2 * S - 2) // S, (length + S - 1) // S
        place = ops.expand_dims(position.offset, 1) + place
    if not static:  # at least 1, which JAX must know; an update of an unfinished block is not kept
        num_updates = num_blocks
    elif not keep_state:  # no token of the call reads what the last block writes
        num_updates = min(num_updates, num_blocks - 1)
    taken = length if lengths is None else lengths
    return Chunk(
        block_size=S,
        alignment=alignment,
        length=length,
        lengths=lengths,
        keep_state=keep_state,
        positional=static and not aligned and length <= S,
        num_blocks=num_blocks,
        num_updates=num_updates,
        position=place,
        completed=ops.floor_divide(position.offset + taken, S),
    )
