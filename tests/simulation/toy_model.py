"""The model of simulated workers and its KV pool. A token is a function of the KV before it, and KV
says whose it is.

    K of a slot   hash of the salt and of all tokens up to and including the slot's
    V of a slot   number of the job that wrote it into this pool: computed it, or pushed it under its reservation

A sequence may read what another job wrote only where it found a cached prefix. Whatever else it
reads must be its own, with the right hash: stale, foreign or corrupt KV fails the simulation where
it is read (I4), before it becomes a wrong token.
"""

import zlib
from array import array
from collections.abc import Callable, Sequence

from kvrelay.core.finish_rules import finish_reason
from kvrelay.core.job import FinishReason, Job, JobId, SequenceToken, Token
from kvrelay.core.model_spec import KVLayout, ModelSpec
from kvrelay.kv_cache.block_manager import BlockCopy
from kvrelay.kv_transfer.layout import KVSpan
from kvrelay.worker.step import Step, StepEntry
from kvrelay.worker.verification import accept_tokens

VOCAB_SIZE = 50
NUM_LAYERS = 2
MODEL = ModelSpec("toy", "llama", KVLayout(NUM_LAYERS, 1, 1, "float32"), VOCAB_SIZE, 96, (0,), "f" * 32)
KILLER_TOKEN = 48
"""A prompt that begins with it kills the process that computes it."""
POISON_TOKEN = 49
"""A prompt that begins with it makes every step fail."""


class ForeignKVError(BaseException):
    """KV was read that is not the reader's. No handler may take it for a failure of the step."""


def token_after(key: int, last_token: int, seed: int, number: int, index: int, greedy: bool) -> int:
    """What follows a prefix whose hash is `key`: often a repetition, at times the end."""
    if not greedy:
        key = zlib.crc32(b"%d %d %d %d" % (key, seed, number, index))
    if key % 8 == 0:
        return 0 if key % 5 == 0 else 1 + key // 8 % (KILLER_TOKEN - 1)
    return 1 + (5 * last_token + key % 3 + number) % 7


def chain(keys: list[int], token_ids: Sequence[int], salt: str) -> None:
    """Makes `keys` as long as `token_ids`: the K of every position."""
    key = keys[-1] if keys else zlib.crc32(salt.encode())
    for token_id in token_ids[len(keys) :]:
        key = zlib.crc32(bytes((token_id,)), key)
        keys.append(key)


def sample(job: Job, number: int, index: int, key: int, last_token: int) -> int:
    """The token of a sequence at an output index."""
    sampling = job.sampling
    assert sampling.seed is not None, "resolved by the gateway"
    return token_after(key, last_token, sampling.seed, number, index, sampling.greedy)


def expected_output(job: Job, number: int) -> tuple[list[int], FinishReason]:
    """All tokens of a sequence, as they come without any fault, and why it ends. Stop strings are
    not applied.
    """
    token_ids, keys = list(job.token_ids), list[int]()
    while True:
        chain(keys, token_ids, job.cache_salt)
        index = len(token_ids) - job.num_prompt_tokens
        token_ids.append(sample(job, number, index, keys[-1], token_ids[-1]))
        if reason := finish_reason(token_ids[-1], index, job.num_prompt_tokens, job.sampling, MODEL):
            return token_ids[job.num_prompt_tokens :], reason


class ToyPool:
    """K and V of every layer, block and slot.

    Args:
        num_blocks: in the pool.
        block_size: tokens per block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._keys = [[[0] * block_size for _ in range(num_blocks)] for _ in range(NUM_LAYERS)]
        self._writers = [[[0] * block_size for _ in range(num_blocks)] for _ in range(NUM_LAYERS)]
        self._numbers: dict[JobId, int] = {}
        self._reservations: dict[int, tuple[tuple[int, ...], JobId]] = {}
        self.is_held_for: Callable[[JobId], bool] = lambda job_id: True
        """Whether the worker still holds the blocks that it reserved for a job."""

    def number_of(self, job_id: JobId) -> int:
        """The job's number in this pool."""
        return self._numbers.setdefault(job_id, len(self._numbers) + 1)

    def note_reserved(self, job_id: JobId, block_ids: tuple[int, ...]) -> None:
        """Whatever is imported into this very tuple of blocks is the job's."""
        self._reservations[id(block_ids)] = (block_ids, job_id)

    def write(self, layer: int, block_ids: Sequence[int], begin: int, keys: Sequence[int], writer: int) -> None:
        """K of the positions from `begin` on."""
        size, layer_keys, layer_writers = self._block_size, self._keys[layer], self._writers[layer]
        for position, key in enumerate(keys, begin):
            block, slot = block_ids[position // size], position % size
            layer_keys[block][slot] = key
            layer_writers[block][slot] = writer

    def check(self, block_ids: Sequence[int], keys: Sequence[int], end: int, num_shared: int, writer: int) -> None:
        """Checks what a sequence is about to read: positions [0, end), of which it found
        `num_shared` in the cache.
        """
        size = self._block_size
        for begin in range(0, end, size):
            count, block = min(size, end - begin), block_ids[begin // size]
            wanted = keys[begin : begin + count]
            for layer in range(NUM_LAYERS):
                if self._keys[layer][block][:count] != wanted:
                    raise ForeignKVError(
                        f"I4: block {block} of layer {layer} has other KV than that of positions from {begin}"
                    )
                if begin >= num_shared and self._writers[layer][block][:count].count(writer) != count:
                    raise ForeignKVError(f"I4: block {block} of layer {layer} was written by another job")

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        for copy in copies:
            for layer in range(NUM_LAYERS):
                self._keys[layer][copy.target] = list(self._keys[layer][copy.source])
                self._writers[layer][copy.target] = list(self._writers[layer][copy.source])

    # --- what senders and receivers use

    def export_kv(self, buffer: memoryview, span: KVSpan, block_ids: Sequence[int]) -> None:
        size, payload = self._block_size, array("I")
        tokens = range(span.token_begin, span.token_end)
        for layer in range(span.layer_begin, span.layer_end):
            for table in (self._keys[layer], self._writers[layer]):
                payload.extend(table[block_ids[token // size]][token % size] for token in tokens)
        buffer[:] = payload.tobytes()

    def import_kv(self, payload: memoryview | bytes, span: KVSpan, block_ids: Sequence[int]) -> None:
        _, job_id = self._reservations[id(block_ids)]
        if not self.is_held_for(job_id):
            raise ForeignKVError(f"I4: a push of {job_id} writes into blocks that were freed")
        writer = self.number_of(job_id)
        numbers, num_tokens = array("I", bytes(payload)), span.num_tokens
        for offset, layer in enumerate(range(span.layer_begin, span.layer_end)):
            begin = 2 * offset * num_tokens
            self.write(layer, block_ids, span.token_begin, numbers[begin : begin + num_tokens], writer)


class ToyStepRunner:
    """In place of `kvrelay.worker.step_runner.StepRunner`.

    Args:
        pool: the worker's.
        compute: takes the time of one layer of a step.
        die: ends the process.
    """

    def __init__(self, pool: ToyPool, compute: Callable[[Step], None], die: Callable[[], None]) -> None:
        self._pool = pool
        self._compute = compute
        self._die = die
        self._keys: dict[int, tuple[object, list[int]]] = {}

    def run(self, step: Step, on_layer_written: Callable[[int], None] | None = None) -> list[SequenceToken]:
        first_tokens = {entry.sequence.token_ids[0] for entry in step.entries}
        if KILLER_TOKEN in first_tokens:
            self._die()
        if POISON_TOKEN in first_tokens:
            raise RuntimeError("a poisoned prompt")
        self._pool.copy_blocks(step.copies)
        parts = [(entry, self._keys_of(entry)) for entry in step.entries]
        for entry, keys in parts:
            self._check(entry, keys, entry.token_begin)
        for layer in range(NUM_LAYERS):
            self._compute(step)
            for entry, keys in parts:
                self._write(layer, entry, keys)
            if on_layer_written is not None:
                on_layer_written(layer)
        sampled: list[Token] = []
        for entry, keys in parts:
            if entry.continued:
                self._check(entry, keys, entry.token_end + len(entry.drafts))
                sampled.extend(self._sample(entry, keys))
        return accept_tokens(step.entries, sampled, MODEL)

    def _keys_of(self, entry: StepEntry) -> list[int]:
        """K of all tokens of the entry's sequence and of its drafts."""
        sequence = entry.sequence
        kept = self._keys.setdefault(id(sequence), (sequence, []))[1]
        chain(kept, sequence.token_ids, sequence.job.cache_salt)
        if not entry.drafts:
            return kept
        keys = list(kept)
        chain(keys, [*sequence.token_ids, *entry.drafts], sequence.job.cache_salt)
        return keys

    def _check(self, entry: StepEntry, keys: list[int], end: int) -> None:
        table = entry.sequence.block_table
        assert table is not None, "a scheduled sequence holds blocks"
        writer = self._pool.number_of(entry.job_id)
        self._pool.check(table.blocks, keys, end, table.num_cached_tokens, writer)

    def _write(self, layer: int, entry: StepEntry, keys: list[int]) -> None:
        table = entry.sequence.block_table
        assert table is not None, "nobody takes a sequence's blocks during its step"
        part = keys[entry.token_begin : entry.token_end + len(entry.drafts)]
        self._pool.write(layer, table.blocks, entry.token_begin, part, self._pool.number_of(entry.job_id))

    @staticmethod
    def _sample(entry: StepEntry, keys: list[int]) -> list[Token]:
        """One token for each continued sequence, or one for each row of an entry with drafts."""
        job, end = entry.sequence.job, entry.token_end
        token_ids = [*entry.sequence.token_ids[:end], *entry.drafts]
        rows = [(entry.continued[0], end + offset) for offset in range(entry.num_logits)] if entry.drafts else []
        rows = rows or [(number, end) for number in entry.continued]
        return [
            Token(sample(job, number, row_end - job.num_prompt_tokens, keys[row_end - 1], token_ids[row_end - 1]))
            for number, row_end in rows
        ]
