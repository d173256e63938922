"""The flat batch of one step as arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from kvrelay.engine.native.library import TILE_ROWS

Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SequenceInput:
    """One sequence's share of a step.

    sequence    |<- KV in blocks ->|<- token_ids ->|
                0               position     position + len(token_ids)
    """

    token_ids: Sequence[int]
    position: int
    block_ids: Sequence[int]  # with room for the new tokens
    num_logits: int  # wanted, of the last new tokens


class KernelBatch:
    """Must outlive the step, because the kernels get its addresses."""

    def __init__(self, batch: Sequence[SequenceInput], block_size: int) -> None:
        lengths = [len(item.token_ids) for item in batch]
        self.token_ids = np.fromiter(chain.from_iterable(item.token_ids for item in batch), dtype=np.int64)
        ends = np.cumsum(lengths)
        begins = ends - lengths
        starts = np.fromiter((item.position for item in batch), dtype=np.int64, count=len(batch))
        # A row's position is its place in the flat batch, shifted by where its sequence is.
        self.positions = np.arange(ends[-1]) + np.repeat(starts - begins, lengths)
        self.num_positions = int((starts + lengths).max())
        tables = [np.fromiter(item.block_ids, dtype=np.int64, count=len(item.block_ids)) for item in batch]
        room = np.array([len(table) * block_size for table in tables])
        assert (starts + lengths <= room).all(), "the tokens lie outside of the blocks"
        self.block_ids = np.concatenate(tables)
        table_begins = np.cumsum([0, *(len(table) for table in tables[:-1])])
        block_of = self.positions // block_size + np.repeat(table_begins, lengths)
        self.slots = self.block_ids[block_of] * block_size + self.positions % block_size
        # the fields of `segment`, one row each
        self.segments = np.empty((len(batch), 4), dtype=np.int64)
        self.segments[:, 0], self.segments[:, 1], self.segments[:, 2] = begins, lengths, starts
        self.segments[:, 3] = self.block_ids.ctypes.data + table_begins * self.block_ids.itemsize
        wanted = [(end - item.num_logits, end) for item, end in zip(batch, ends.tolist(), strict=True)]
        self.logit_rows = np.fromiter(chain.from_iterable(range(*span) for span in wanted), dtype=np.int64)
        self._lengths = lengths
        self._tiles: Numbers | None = None

    def tiles(self, num_queries_per_kv: int) -> Numbers:
        """(segment, first token, number of tokens) each; slow ones, with most keys, first."""
        if self._tiles is None:
            size = max(1, TILE_ROWS // num_queries_per_kv)
            tiles = [
                (segment, begin, min(size, length - begin))
                for segment, length in enumerate(self._lengths)
                for begin in range(0, length, size)
            ]
            self._tiles = np.array(tiles[::-1], dtype=np.int64).reshape(-1, 3)
        return self._tiles
