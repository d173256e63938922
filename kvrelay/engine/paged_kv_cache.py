"""The KV pool of a worker: one tensor of blocks, and how keys and values enter and leave it.

Knows nothing of who holds which block (`kvrelay.kv_cache.block_manager` does) and of how attention reads them.

On the wire and in `export_kv` a range of tokens is, per layer, K then V, [tokens, kv_heads, head_dim]: no block size in it.
In int8 a head's row is head_dim numbers and the scale behind them (`KV_SCALE_BYTES`); the pool has bytes, copied like any others.
"""

import ctypes
import math
import mmap
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvrelay.engine.native.library import KVBlocks, NativeLibrary
from kvrelay.errors import TransferError
from kvrelay.kv_cache.block_manager import BlockCopy
from kvrelay.model_spec import KVLayout

_WORD_TYPES = (torch.complex128, torch.int64, torch.int32, torch.int16, torch.uint8)
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class PagedKVCache:
    """K and V of every layer in blocks.

    `export_kv`, `import_kv` and `copy_blocks` may be called from any thread for blocks that the running step does not touch.

    Args:
        layout: the model's KV layout.
        num_blocks: blocks in the pool.
        block_size: tokens per block.
        device: where the pool lies.
        kernels: copy KV in and out of a CPU's pool faster than torch; None to leave it to torch.
    """

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
        row_items = layout.row_bytes // dtype.itemsize  # head_dim; in int8, bytes of numbers and scale
        # [num_layers, 2 (K, V), num_blocks, block_size, num_kv_heads, row_items]: a block is one contiguous row per layer and
        # side, so gathering a sequence copies few long rows. Zeros, for a masked NaN would still spoil a softmax's sum.
        shape = (layout.num_layers, 2, num_blocks, block_size, layout.num_kv_heads, row_items)
        self._pool = _zeros(shape, dtype, self.device)
        self._gathered = self._pool.new_empty((2, 0, *self._pool.shape[3:]))
        # The same memory by slots: slot = block * block_size + offset.
        self._slots = self._pool.flatten(2, 3)  # [num_layers, 2, num_slots, num_kv_heads, row_items]

    @property
    def pool_bytes(self) -> int:
        """Size of the pool."""
        return self._pool.numel() * self._pool.element_size()

    @property
    def pool_address(self) -> int:
        """Where the pool begins: [num_layers, 2 (K, V), num_blocks, block_size, num_kv_heads, a head's row]."""
        return self._pool.data_ptr()

    def layer_addresses(self, layer: int) -> tuple[int, int]:
        """Where K and V of a layer begin: each [num_blocks, block_size, num_kv_heads, a head's row]."""
        return self._pool[layer, 0].data_ptr(), self._pool[layer, 1].data_ptr()

    def slots_for(self, block_ids: Sequence[int], token_begin: int, token_end: int) -> Tensor:
        """Slots of the tokens [token_begin, token_end) of the sequence that holds `block_ids`: int64 [num_tokens], on the CPU."""
        assert 0 <= token_begin <= token_end <= len(block_ids) * self.block_size, "the tokens lie outside of the blocks"
        tokens = np.arange(token_begin, token_end)
        first_block = token_begin // self.block_size
        last_block = -(-token_end // self.block_size)
        blocks = np.asarray(block_ids[first_block:last_block], dtype=np.int64)
        slots = blocks[tokens // self.block_size - first_block] * self.block_size + tokens % self.block_size
        return torch.from_numpy(slots)

    def write(self, layer: int, slot_mapping: Tensor, key: Tensor, value: Tensor) -> None:
        """Writes one layer's K and V of a step. Not in int8, which only the kernels write and read.

        Args:
            layer: from 0.
            slot_mapping: int64 [num_tokens].
            key: [num_tokens, num_kv_heads, head_dim].
            value: same shape.
        """
        assert self.layout.dtype in TORCH_DTYPES, "the kernels write int8"
        self._slots[layer, 0].index_copy_(0, slot_mapping, key.to(self._pool.dtype))
        self._slots[layer, 1].index_copy_(0, slot_mapping, value.to(self._pool.dtype))

    def gather(self, layer: int, block_ids: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of whole blocks, in the given order: each [num_blocks * block_size, num_kv_heads, head_dim].

        What is returned is overwritten by the next call: for the engine's thread alone, within inference mode.

        Args:
            layer: from 0.
            block_ids: int64 [num_blocks], repeats allowed.
        """
        num_blocks = block_ids.shape[0]
        if num_blocks > self._gathered.shape[1]:
            # Kept, for the page faults of fresh memory cost as much as the copy into it.
            self._gathered = self._pool.new_empty((2, max(num_blocks, 2 * self._gathered.shape[1]), *self._pool.shape[3:]))
        key, value = self._gathered[0, :num_blocks], self._gathered[1, :num_blocks]
        torch.index_select(self._pool[layer, 0], 0, block_ids, out=key)
        torch.index_select(self._pool[layer, 1], 0, block_ids, out=value)
        return key.flatten(0, 1), value.flatten(0, 1)

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copies whole blocks in all layers, in order: a block may be a target and then a source or target again."""
        with torch.inference_mode():
            for copy in copies:
                self._pool[:, :, copy.target].copy_(self._pool[:, :, copy.source])

    def export_kv(self, layer_begin: int, layer_end: int, block_ids: Sequence[int], token_begin: int, token_end: int) -> Tensor:
        """Copies K and V of a range of layers and tokens out of the pool.

        Args:
            layer_begin, layer_end: half-open range of layers.
            block_ids: the sequence's blocks, from its first token on.
            token_begin, token_end: half-open range of the sequence's tokens.

        Returns:
            Contiguous uint8 CPU tensor [layers, 2, tokens, num_kv_heads, row bytes]; `.numpy()` gives its bytes without a copy.
        """
        self._check_range(layer_begin, layer_end, block_ids, token_begin, token_end)
        shape = (layer_end - layer_begin, 2, token_end - token_begin, self.layout.num_kv_heads, self.layout.row_bytes)
        exported = torch.empty(self.export_bytes(layer_end - layer_begin, token_end - token_begin), dtype=torch.uint8)
        self.export_kv_into(exported.numpy().data, layer_begin, layer_end, block_ids, token_begin, token_end)
        return exported.view(shape)

    def export_kv_into(
        self,
        buffer: memoryview,
        layer_begin: int,
        layer_end: int,
        block_ids: Sequence[int],
        token_begin: int,
        token_end: int,
    ) -> None:
        """Copies K and V out of the pool into memory of the caller's: one copy, into memory that is in use already.

        Args:
            buffer: writable bytes, exactly as many as `export_bytes` says.
            layer_begin, layer_end, block_ids, token_begin, token_end: as in `export_kv`.
        """
        self._check_range(layer_begin, layer_end, block_ids, token_begin, token_end)
        num_bytes = self.export_bytes(layer_end - layer_begin, token_end - token_begin)
        assert buffer.nbytes == num_bytes, "the buffer has the size of the range"
        if num_bytes == 0:
            return
        if self._kernels is not None:
            self._copy(self._kernels, buffer, layer_begin, layer_end, block_ids, token_begin, token_end, into_pool=False)
            return
        with torch.inference_mode():
            rows, index = self._wire_rows(layer_begin, layer_end, block_ids, token_begin, token_end)
            target = _bytes_of(buffer).view(rows.dtype).view(rows.shape[0], 2, len(index), -1)
            if self.device.type == "cpu":
                torch.index_select(rows, 2, index, out=target)
            else:
                target.copy_(rows.index_select(2, index))

    def import_kv(
        self,
        payload: memoryview | bytes,
        layer_begin: int,
        layer_end: int,
        block_ids: Sequence[int],
        token_begin: int,
        token_end: int,
    ) -> None:
        """Copies K and V, as `export_kv` gave them, into the pool.

        Args:
            payload: raw bytes; read only during the call.
            layer_begin, layer_end, block_ids, token_begin, token_end: as in `export_kv`.

        Raises:
            TransferError: the payload has another length than the layout says; nothing is written.
        """
        self._check_range(layer_begin, layer_end, block_ids, token_begin, token_end)
        view = memoryview(payload).cast("B")
        expected_bytes = self.export_bytes(layer_end - layer_begin, token_end - token_begin)
        if len(view) != expected_bytes:
            raise TransferError(f"a KV payload has {len(view)} bytes where the model's layout needs {expected_bytes}")
        if expected_bytes == 0:
            return
        if self._kernels is not None:
            self._copy(self._kernels, view, layer_begin, layer_end, block_ids, token_begin, token_end, into_pool=True)
            return
        with torch.inference_mode():
            rows, index = self._wire_rows(layer_begin, layer_end, block_ids, token_begin, token_end)
            source = _bytes_of(view).view(rows.dtype).view(rows.shape[0], 2, len(index), -1)
            rows.index_copy_(2, index, source.to(self.device))

    def _copy(
        self,
        kernels: NativeLibrary,
        wire: memoryview,
        layer_begin: int,
        layer_end: int,
        block_ids: Sequence[int],
        token_begin: int,
        token_end: int,
        *,
        into_pool: bool,
    ) -> None:
        """Copies between the pool and memory in the wire's order, by the kernels."""
        first, last = token_begin // self.block_size, -(-token_end // self.block_size)
        ids = (ctypes.c_int64 * (last - first))(*block_ids[first:last])
        assert all(0 <= block < self.num_blocks for block in ids), "the blocks lie outside of the pool"
        keys_address, values_address = self.layer_addresses(layer_begin)
        row_bytes = self.layout.num_kv_heads * self.layout.row_bytes
        blocks = KVBlocks(keys_address, values_address - keys_address, row_bytes, self.block_size, ids)
        begin, end = token_begin - first * self.block_size, token_end - first * self.block_size
        address = np.frombuffer(wire, dtype=np.uint8).ctypes.data
        kernels.copy_kv(blocks, layer_end - layer_begin, begin, end, address, into_pool=into_pool)

    def _wire_rows(
        self, layer_begin: int, layer_end: int, block_ids: Sequence[int], token_begin: int, token_end: int
    ) -> tuple[Tensor, Tensor]:
        """The pool as rows that are copied as they are, and which of them hold the tokens.

        A row is a block where the tokens are whole blocks, else a token: long rows copy twice as fast as short ones.

        Returns:
            words [layers, 2, num_rows, words per row] and int64 [num_rows of the tokens].
        """
        pool = self._pool[layer_begin:layer_end]
        if token_begin % self.block_size == 0 and token_end % self.block_size == 0:
            rows = pool.flatten(3)
            first, last = token_begin // self.block_size, token_end // self.block_size
            index = torch.tensor(block_ids[first:last], dtype=torch.int64)
        else:
            rows = pool.flatten(4).flatten(2, 3)
            index = self.slots_for(block_ids, token_begin, token_end)
        return rows.view(_word_type(rows)), index.to(self.device)

    def export_bytes(self, num_layers: int, num_tokens: int) -> int:
        """Bytes of so many tokens in so many layers."""
        return num_layers * num_tokens * self.layout.bytes_per_layer_token

    def _check_range(self, layer_begin: int, layer_end: int, block_ids: Sequence[int], token_begin: int, token_end: int) -> None:
        assert 0 <= layer_begin <= layer_end <= self.layout.num_layers, "the layers lie outside of the model"
        assert 0 <= token_begin <= token_end <= len(block_ids) * self.block_size, "the tokens lie outside of the blocks"


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU as pages that the kernel makes when they are first written to: a pool that is not full costs neither time
    nor memory. Not large pages: attention would read them some 10 % faster, but making one stops a step for up to 100 ms.

    Raises:
        RuntimeError: so much memory cannot be had.
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
    """The widest type that rows can be copied by; what the bits mean is of no matter."""
    row_bytes = rows.shape[-1] * rows.element_size()
    return next(dtype for dtype in _WORD_TYPES if row_bytes % dtype.itemsize == 0)


def _bytes_of(buffer: memoryview) -> Tensor:
    """The buffer's bytes as a tensor over the same memory, which the caller keeps alive, and does not write to if it must not."""
    array = np.frombuffer(buffer, dtype=np.uint8)
    if not array.flags.writeable:
        # Torch takes no read-only memory, for it cannot know that it is only read.
        array = np.ctypeslib.as_array((ctypes.c_uint8 * array.nbytes).from_address(array.ctypes.data))
    return torch.from_numpy(array)
