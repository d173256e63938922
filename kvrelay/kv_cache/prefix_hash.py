"""Names of token prefixes: a chain of hashes, one per full block.

    tokens   | block 0 | block 1 | block 2 | rest |
    hash     h0 = H(root(salt), tokens 0)   h1 = H(h0, tokens 1)   h2 = H(h1, tokens 2)

A tenant's salt hides its prefixes from other tenants. H is cryptographic, so that no client can
choose tokens whose names are another client's.
"""

import hashlib
from array import array
from collections.abc import Iterator, Sequence


def root_hash(salt: str) -> bytes:  # 16 bytes
    return hashlib.blake2b(salt.encode(), digest_size=16, person=b"kvrelay prefix").digest()


def chain_hash(parent: bytes, block_tokens: bytes) -> bytes:
    """16 bytes: `parent` continued by one full block."""
    return hashlib.blake2b(parent + block_tokens, digest_size=16).digest()


def pack_tokens(token_ids: Sequence[int]) -> bytes:  # 8 bytes each
    return array("q", token_ids).tobytes()


def prefix_chain(
    token_ids: Sequence[int], block_size: int, salt: str, num_blocks: int
) -> Iterator[tuple[bytes, bytes]]:
    """Yields (hash, packed tokens) of each full block, lazily."""
    parent = root_hash(salt)
    for number in range(num_blocks):
        block_tokens = pack_tokens(token_ids[number * block_size : (number + 1) * block_size])
        parent = chain_hash(parent, block_tokens)
        yield parent, block_tokens
