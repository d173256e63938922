"""Greedy generation with our engine for tests: a prompt in chunks, then token by token, beside
other sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvrelay.engine.kernel_batch import SequenceInput
from kvrelay.engine.model_runner import LoadedModel, ModelRunner
from kvrelay.engine.paged_kv_cache import PagedKVCache
from kvrelay.kv_cache.block_manager import BlockManager, BlockTable
from kvrelay.kv_transfer.layout import KVSpan


@dataclass
class RunningPrompt:
    """One sequence of a test run, and the logits behind each of its computed positions that was
    sampled.
    """

    token_ids: list[int]
    num_prompt_tokens: int
    chunk_tokens: int
    table: BlockTable
    num_computed: int = 0
    logits: list[Tensor] = field(default_factory=list)

    @property
    def generated(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]


def exported_kv(cache: PagedKVCache, span: KVSpan, block_ids: Sequence[int]) -> Tensor:
    """uint8 [layers, 2, tokens, num_kv_heads, row bytes]"""
    exported = torch.empty(span.num_bytes(cache.layout), dtype=torch.uint8)
    cache.export_kv(exported.numpy().data, span, block_ids)
    return exported.view(span.num_layers, 2, span.num_tokens, cache.layout.num_kv_heads, cache.layout.row_bytes)


def slots_of(cache: PagedKVCache, block_ids: Sequence[int], num_tokens: int) -> Tensor:
    """Where the first tokens of a sequence lie in the pool: int64 [num_tokens]"""
    size = cache.block_size
    return torch.tensor([block_ids[token // size] * size + token % size for token in range(num_tokens)])


class PagedGeneration:
    """Runs several sequences together; each step takes a chunk of every prompt and a token of every
    decoding one.
    """

    def __init__(self, model: LoadedModel, *, num_blocks: int = 128, block_size: int = 4) -> None:
        self.manager = BlockManager(num_blocks, block_size, enable_prefix_cache=False)
        self.cache = PagedKVCache(model.spec.kv_layout, num_blocks, block_size, model.device)
        self.runner = ModelRunner(model, self.cache)
        self.running: list[RunningPrompt] = []

    def start(self, prompt: Sequence[int], chunk_tokens: int) -> RunningPrompt:
        """Adds a sequence. Its logits are those behind every chunk's last token, then behind every
        generated token.
        """
        started = RunningPrompt(list(prompt), len(prompt), chunk_tokens, self.manager.allocate(prompt, ""))
        self.running.append(started)
        return started

    def step(self) -> None:
        """One forward for all sequences; those whose tokens are all computed take the likeliest
        next token.
        """
        batch = []
        for item in self.running:
            end = min(len(item.token_ids), item.num_computed + item.chunk_tokens)
            self.cache.copy_blocks(self.manager.grow(item.table, end))
            batch.append(
                SequenceInput(
                    item.token_ids[item.num_computed : end], item.num_computed, item.table.blocks, num_logits=1
                )
            )
        logits = self.runner.run(batch)
        for item, entry, row in zip(self.running, batch, logits, strict=True):
            item.num_computed += len(entry.token_ids)
            item.logits.append(row)
            if item.num_computed == len(item.token_ids):
                item.token_ids.append(int(row.argmax()))

    def generate(self, item: RunningPrompt, num_tokens: int) -> list[int]:
        """Steps until this sequence has so many generated tokens."""
        while len(item.generated) < num_tokens:
            self.step()
        return item.generated
