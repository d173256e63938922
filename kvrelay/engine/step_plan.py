"""What the kernels must know of one step: where its tokens lie in the pool and which are attended to together.

Knows nothing of models. For torch's attention, `attention_context` has the same.
"""

from collections.abc import Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from kvrelay.engine.native.library import TILE_ROWS
from kvrelay.engine.paged_kv_cache import PagedKVCache
from kvrelay.engine.step_input import StepInput

Numbers = NDArray[np.int64]


class StepPlan:
    """Arrays of one step, at addresses that stay as long as this lives.

    Args:
        batch: the step's inputs, in the order of the flat batch.
        cache: the pool.
        num_sharing_heads: query heads that share a key.
    """

    def __init__(self, batch: Sequence[StepInput], cache: PagedKVCache, num_sharing_heads: int) -> None:
        lengths = [len(item.token_ids) for item in batch]
        self.token_ids = np.fromiter(chain.from_iterable(item.token_ids for item in batch), dtype=np.int64)
        ends = np.cumsum(lengths)
        begins = ends - lengths
        starts = np.fromiter((item.position for item in batch), dtype=np.int64, count=len(batch))
        # A row's position is its place in the flat batch, moved by where its sequence is.
        self.positions = np.arange(ends[-1]) + np.repeat(starts - begins, lengths)
        self.num_positions = int((starts + lengths).max())
        tables = [np.fromiter(item.block_ids, dtype=np.int64, count=len(item.block_ids)) for item in batch]
        self.block_ids = np.concatenate(tables)
        table_begins = np.cumsum([0, *(len(table) for table in tables[:-1])])
        block_of = self.positions // cache.block_size + np.repeat(table_begins, lengths)
        self.slots = self.block_ids[block_of] * cache.block_size + self.positions % cache.block_size
        self.segments = np.empty((len(batch), 4), dtype=np.int64)  # the fields of `segment`, one row each
        self.segments[:, 0], self.segments[:, 1], self.segments[:, 2] = begins, lengths, starts
        self.segments[:, 3] = self.block_ids.ctypes.data + table_begins * self.block_ids.itemsize
        self.tiles = _tiles(lengths, tokens_per_tile=max(1, TILE_ROWS // num_sharing_heads))
        wanted = [(end - item.num_logits, end) for item, end in zip(batch, ends.tolist(), strict=True)]
        self.logit_rows = np.fromiter(chain.from_iterable(range(*span) for span in wanted), dtype=np.int64)


def _tiles(lengths: Sequence[int], tokens_per_tile: int) -> Numbers:
    """(segment, first token, number of tokens) of each attention tile, those with most keys first: they take longest."""
    tiles = [
        (segment, begin, min(tokens_per_tile, length - begin))
        for segment, length in enumerate(lengths)
        for begin in range(0, length, tokens_per_tile)
    ]
    return np.array(tiles[::-1], dtype=np.int64).reshape(-1, 3)
