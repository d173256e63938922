"""Names of token prefixes: a chain of hashes, one per full block, so that equal prefixes share a name and others do not.

    tokens   | block 0 | block 1 | block 2 | rest |
    hash     h0 = H(root(salt), tokens 0)   h1 = H(h0, tokens 1)   h2 = H(h1, tokens 2)

The salt separates tenants: a prefix of one is never found by another. Knows nothing of blocks' numbers or of who holds them.
"""

from array import array
from collections.abc import Iterator, Sequence

import xxhash


def root_hash(salt: str) -> bytes:
    """Start of every chain of that salt: 16 bytes."""
    return xxhash.xxh3_128_digest(b"kvrelay prefix\x00" + salt.encode())


def chain_hash(parent: bytes, block_tokens: bytes) -> bytes:
    """Name of the prefix that continues `parent` by one full block: 16 bytes."""
    return xxhash.xxh3_128_digest(parent + block_tokens)


def pack_tokens(token_ids: Sequence[int]) -> bytes:
    """Token ids as 8 bytes each, the form in which they are hashed and compared."""
    return array("q", token_ids).tobytes()


def prefix_chain(token_ids: Sequence[int], block_size: int, salt: str, num_blocks: int) -> Iterator[tuple[bytes, bytes]]:
    """Yields (hash, packed tokens) of each of the first `num_blocks` full blocks, lazily.

    Args:
        token_ids: at least `num_blocks * block_size` tokens.
        block_size: tokens per block.
        salt: tenant's salt.
        num_blocks: how many blocks to name.
    """
    parent = root_hash(salt)
    for number in range(num_blocks):
        block_tokens = pack_tokens(token_ids[number * block_size : (number + 1) * block_size])
        parent = chain_hash(parent, block_tokens)
        yield parent, block_tokens
