"""The KV pool of a worker: one tensor of blocks.

Exported KV is K, then V of each layer, [tokens, kv_heads, head_dim]: without blocks. In int8 a
head's row is head_dim numbers and their scale (`KV_SCALE_BYTES`).
"""

import ctypes
import math
import mmap
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from kvrelay.core.model_spec import KVLayout
from kvrelay.engine.native.library import KVBlocks, NativeLibrary
from kvrelay.errors import TransferError
from kvrelay.kv_cache.block_manager import BlockCopy
from kvrelay.kv_transfer.layout import KVSpan

_WORD_TYPES = (torch.complex128, torch.int64, torch.int32, torch.int16, torch.uint8)
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class PagedKVCache:
    """Any thread may export, import and copy blocks that the running step does not touch."""

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        block_size: int,
        device: torch.device | str = "cpu",
        kernels: NativeLibrary | None = None,
    ) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.device = torch.device(device)
        self._kernels = kernels if self.device.type == "cpu" else None
        dtype = TORCH_DTYPES.get(layout.dtype, torch.uint8)
        # head_dim; in int8, bytes of numbers and scale
        row_items = layout.row_bytes // dtype.itemsize
        # [num_layers, 2 (K, V), num_blocks, block_size, num_kv_heads, row_items]: a block is one
        # contiguous row per layer and side, so gathering a sequence copies few long rows. Zeros,
        # because a masked NaN spoils a softmax's sum.
        shape = (layout.num_layers, 2, num_blocks, block_size, layout.num_kv_heads, row_items)
        self._pool = _zeros(shape, dtype, self.device)
        self._gathered = self._pool.new_empty((2, 0, *self._pool.shape[3:]))
        # The same memory by slots: slot = block * block_size + offset.
        # [num_layers, 2, num_slots, num_kv_heads, row_items]
        self._slots = self._pool.flatten(2, 3)

    @property
    def pool_bytes(self) -> int:
        return self._pool.numel() * self._pool.element_size()

    @property
    def pool_address(self) -> int:
        return self._pool.data_ptr()

    def layer_addresses(self, layer: int) -> tuple[int, int]:
        """K and V, each [num_blocks, block_size, num_kv_heads, row]."""
        return self._pool[layer, 0].data_ptr(), self._pool[layer, 1].data_ptr()

    def write(self, layer: int, slot_mapping: Tensor, key: Tensor, value: Tensor) -> None:
        """Writes one layer's K and V of a step, each [num_tokens, num_kv_heads, head_dim].

        slot_mapping: int64 [num_tokens].
        """
        assert self.layout.dtype in TORCH_DTYPES, "the kernels write int8"
        self._slots[layer, 0].index_copy_(0, slot_mapping, key.to(self._pool.dtype))
        self._slots[layer, 1].index_copy_(0, slot_mapping, value.to(self._pool.dtype))

    def gather(self, layer: int, block_ids: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [num_blocks] to K and V, each [num_blocks * block_size, num_kv_heads, head_dim].

        The next call overwrites them. Only for the engine thread.
        """
        num_blocks = block_ids.shape[0]
        if num_blocks > self._gathered.shape[1]:
            # Kept, because page faults of fresh memory cost as much as the copy into it.
            self._gathered = self._pool.new_empty(
                (2, max(num_blocks, 2 * self._gathered.shape[1]), *self._pool.shape[3:])
            )
        key, value = self._gathered[0, :num_blocks], self._gathered[1, :num_blocks]
        torch.index_select(self._pool[layer, 0], 0, block_ids, out=key)
        torch.index_select(self._pool[layer, 1], 0, block_ids, out=value)
        return key.flatten(0, 1), value.flatten(0, 1)

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copies in order: a target may be a later source or target."""
        with torch.inference_mode():
            for copy in copies:
                self._pool[:, :, copy.target].copy_(self._pool[:, :, copy.source])

    def export_kv(self, buffer: memoryview, span: KVSpan, block_ids: Sequence[int]) -> None:
        """Fills the buffer with [layers, 2 (K, V), tokens, num_kv_heads, row bytes]."""
        self._check_span(span, block_ids)
        assert buffer.nbytes == span.num_bytes(self.layout), "the buffer has the size of the span"
        if buffer.nbytes == 0:
            return
        if self._kernels is not None:
            self._copy(self._kernels, buffer, span, block_ids, into_pool=False)
            return
        with torch.inference_mode():
            rows, index = self._wire_rows(span, block_ids)
            target = _bytes_of(buffer).view(rows.dtype).view(rows.shape[0], 2, len(index), -1)
            if self.device.type == "cpu":
                torch.index_select(rows, 2, index, out=target)
            else:
                target.copy_(rows.index_select(2, index))

    def import_kv(self, payload: memoryview | bytes, span: KVSpan, block_ids: Sequence[int]) -> None:
        """Copies what `export_kv` gave into the pool.

        Raises:
            TransferError: the payload has the wrong length; nothing is written.
        """
        self._check_span(span, block_ids)
        view = memoryview(payload).cast("B")
        expected_bytes = span.num_bytes(self.layout)
        if len(view) != expected_bytes:
            raise TransferError(f"a KV payload has {len(view)} bytes where the model's layout needs {expected_bytes}")
        if expected_bytes == 0:
            return
        if self._kernels is not None:
            self._copy(self._kernels, view, span, block_ids, into_pool=True)
            return
        with torch.inference_mode():
            rows, index = self._wire_rows(span, block_ids)
            source = _bytes_of(view).view(rows.dtype).view(rows.shape[0], 2, len(index), -1)
            rows.index_copy_(2, index, source.to(self.device))

    def _copy(
        self, kernels: NativeLibrary, wire: memoryview, span: KVSpan, block_ids: Sequence[int], *, into_pool: bool
    ) -> None:
        first, last = span.token_begin // self.block_size, -(-span.token_end // self.block_size)
        ids = (ctypes.c_int64 * (last - first))(*block_ids[first:last])
        assert all(0 <= block < self.num_blocks for block in ids), "the blocks lie outside of the pool"
        keys_address, values_address = self.layer_addresses(span.layer_begin)
        row_bytes = self.layout.num_kv_heads * self.layout.row_bytes
        blocks = KVBlocks(keys_address, values_address - keys_address, row_bytes, self.block_size, ids)
        skipped = first * self.block_size
        within_blocks = replace(span, token_begin=span.token_begin - skipped, token_end=span.token_end - skipped)
        address = np.frombuffer(wire, dtype=np.uint8).ctypes.data
        kernels.copy_kv(blocks, within_blocks, address, into_pool=into_pool)

    def _wire_rows(self, span: KVSpan, block_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The pool as rows, and which of them hold the tokens.

        Rows are blocks if the tokens are whole blocks, else tokens: long rows copy faster.

        Returns:
            words [layers, 2, num_rows, words per row] and int64 [any].
        """
        pool = self._pool[span.layer_begin : span.layer_end]
        if span.token_begin % self.block_size == 0 and span.token_end % self.block_size == 0:
            rows = pool.flatten(3)
            first, last = span.token_begin // self.block_size, span.token_end // self.block_size
            index = torch.tensor(block_ids[first:last], dtype=torch.int64)
        else:
            rows = pool.flatten(4).flatten(2, 3)
            index = self._slots_of(span, block_ids)
        return rows.view(_word_type(rows)), index.to(self.device)

    def _slots_of(self, span: KVSpan, block_ids: Sequence[int]) -> Tensor:
        """int64 [num_tokens]."""
        tokens = np.arange(span.token_begin, span.token_end)
        blocks = np.asarray(block_ids, dtype=np.int64)
        return torch.from_numpy(blocks[tokens // self.block_size] * self.block_size + tokens % self.block_size)

    def _check_span(self, span: KVSpan, block_ids: Sequence[int]) -> None:
        assert 0 <= span.layer_begin <= span.layer_end <= self.layout.num_layers, "the layers lie outside of the model"
        assert 0 <= span.token_begin <= span.token_end <= len(block_ids) * self.block_size, (
            "the tokens lie outside of the blocks"
        )


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that take memory on a CPU only once written.

    Not large pages: attention would read them 10 % faster, but making one stops a step for 100 ms.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    try:
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise RuntimeError(f"{num_bytes} bytes cannot be had") from error
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def _word_type(rows: Tensor) -> torch.dtype:
    row_bytes = rows.shape[-1] * rows.element_size()
    return next(dtype for dtype in _WORD_TYPES if row_bytes % dtype.itemsize == 0)


def _bytes_of(buffer: memoryview) -> Tensor:
    """A view: the caller keeps the buffer alive."""
    array = np.frombuffer(buffer, dtype=np.uint8)
    if not array.flags.writeable:
        # Torch takes no read-only memory. The caller only reads from this tensor.
        array = np.ctypeslib.as_array((ctypes.c_uint8 * array.nbytes).from_address(array.ctypes.data))
    return torch.from_numpy(array)
