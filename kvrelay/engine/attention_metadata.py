"""Where the tokens of one step lie in the pool, and what each may see.

flat batch    | prompt chunk of a | decode of b | decode of c | prompt chunk of d |
              0                                                          num_tokens
`prefill` holds a and d, each attended to alone; `decode` holds b and c, together.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from kvrelay.engine.kernel_batch import KernelBatch, SequenceInput
from kvrelay.engine.native.library import NativeLibrary
from kvrelay.engine.paged_kv_cache import PagedKVCache

Window = int | None  # most tokens that a token sees, itself included; None: all


@dataclass(slots=True)
class PrefillSegment:
    """Rows [token_begin, token_end) of the flat batch."""

    token_begin: int
    token_end: int
    position: int
    block_ids: Sequence[int]
    block_size: int
    device: torch.device
    _views: dict[Window, "PrefillView"] = field(default_factory=dict)

    def view(self, window: Window) -> "PrefillView":
        if window not in self._views:
            self._views[window] = self._make_view(window)
        return self._views[window]

    def _make_view(self, window: Window) -> "PrefillView":
        num_tokens = self.token_end - self.token_begin
        end = self.position + num_tokens
        within_window = window is None or end <= window
        first_seen = 0 if window is None else max(0, self.position - window + 1)
        first_block = 0 if self.position == 0 else first_seen // self.block_size
        key_begin = first_block * self.block_size
        mask = None
        if not (self.position == 0 and within_window):
            queries = torch.arange(self.position, end).unsqueeze(1)
            keys = torch.arange(key_begin, end).unsqueeze(0)
            mask = keys <= queries
            if window is not None:
                mask &= keys > queries - window
            mask = mask.to(self.device)
        blocks = None
        if self.position > 0:
            blocks = torch.tensor(self.block_ids[first_block : -(-end // self.block_size)], device=self.device)
        return PrefillView(blocks, end - key_begin, mask)


@dataclass(frozen=True, slots=True)
class PrefillView:
    block_ids: Tensor | None  # int64 [num_blocks]; None: the chunk's own keys
    num_keys: int
    mask: Tensor | None  # bool [num_tokens, num_keys], True where seen; None: causal


@dataclass(slots=True)
class DecodeGroup:
    """Sequences of similar length that decode one token each."""

    rows: Tensor  # int64 [num_sequences], rows of the flat batch
    positions: Sequence[int]
    block_ids: Sequence[Sequence[int]]
    block_size: int
    device: torch.device
    _views: dict[Window, "DecodeView"] = field(default_factory=dict)

    def view(self, window: Window) -> "DecodeView":
        if window not in self._views:
            self._views[window] = self._make_view(window)
        return self._views[window]

    def _make_view(self, window: Window) -> "DecodeView":
        size = self.block_size
        first_blocks = [0 if window is None else max(0, position - window + 1) // size for position in self.positions]
        last_blocks = [position // size for position in self.positions]
        num_blocks = max(last - first + 1 for first, last in zip(first_blocks, last_blocks, strict=True))
        table = np.empty((len(self.positions), num_blocks), dtype=np.int64)
        for row, (blocks, first, last) in enumerate(zip(self.block_ids, first_blocks, last_blocks, strict=True)):
            # Padded with the sequence's own last block, so that it reads no other sequence's block.
            table[row] = blocks[last]
            table[row, : last - first + 1] = blocks[first : last + 1]
        positions = np.asarray(self.positions)[:, None]
        begins = np.asarray(first_blocks)[:, None] * size
        keys = begins + np.arange(num_blocks * size)[None, :]  # [num_sequences, num_keys]
        seen = keys <= positions
        if window is not None:
            seen &= keys > positions - window
        unwritten = np.flatnonzero(keys > positions)
        return DecodeView(
            torch.from_numpy(table.reshape(-1)).to(self.device),
            torch.from_numpy(seen).to(self.device),
            torch.from_numpy(unwritten).to(self.device),
        )


@dataclass(frozen=True, slots=True)
class DecodeView:
    """The keys, padded to the longest sequence."""

    block_ids: Tensor  # int64 [num_sequences * num_blocks]
    mask: Tensor  # bool [num_sequences, num_keys], True where seen
    unwritten: Tensor  # int64 [any], indices into [num_sequences * num_keys] of stale keys


class AttentionMetadata:
    """`on_layer_written` gets each layer once the step's K and V are in the pool."""

    def __init__(
        self,
        cache: PagedKVCache,
        batch: Sequence[SequenceInput],
        on_layer_written: Callable[[int], None] | None = None,
        kernels: NativeLibrary | None = None,
        num_parts: int = 0,
    ) -> None:
        self.cache = cache
        self.on_layer_written = on_layer_written
        self.kernels = kernels
        self.num_parts = num_parts
        self.kernel_batch = KernelBatch(batch, cache.block_size)
        # [num_tokens]
        self.slot_mapping = torch.from_numpy(self.kernel_batch.slots).to(cache.device)
        self._batch = batch

    @cached_property
    def prefill(self) -> list[PrefillSegment]:
        ends = itertools.accumulate(len(item.token_ids) for item in self._batch)
        return [
            PrefillSegment(
                end - len(item.token_ids), end, item.position, item.block_ids, self.cache.block_size, self.cache.device
            )
            for item, end in zip(self._batch, ends, strict=True)
            if len(item.token_ids) > 1
        ]

    @cached_property
    def decode(self) -> list[DecodeGroup]:
        ends = itertools.accumulate(len(item.token_ids) for item in self._batch)
        decoding = [(end - 1, item) for item, end in zip(self._batch, ends, strict=True) if len(item.token_ids) == 1]
        return [self._make_group(group) for group in _group_by_length(decoding)]

    def _make_group(self, group: Sequence[tuple[int, SequenceInput]]) -> DecodeGroup:
        return DecodeGroup(
            rows=torch.tensor([row for row, _ in group], device=self.cache.device),
            positions=[item.position for _, item in group],
            block_ids=[item.block_ids for _, item in group],
            block_size=self.cache.block_size,
            device=self.cache.device,
        )


MIN_GROUP_KEYS = 128  # keys; another group costs more than padding shorter sequences


def _group_by_length(decoding: list[tuple[int, SequenceInput]]) -> list[list[tuple[int, SequenceInput]]]:
    """The longest of a group is at most twice the shortest, to pad little."""
    groups: list[list[tuple[int, SequenceInput]]] = []
    longest = 0
    for row, item in sorted(decoding, key=lambda entry: entry[1].position):
        if not groups or item.position + 1 > longest:
            groups.append([])
            longest = max(MIN_GROUP_KEYS, 2 * (item.position + 1))
        groups[-1].append((row, item))
    return groups
