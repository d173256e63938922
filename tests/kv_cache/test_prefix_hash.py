import hashlib

from hypothesis import given
from hypothesis import strategies as st

from kvrelay.kv_cache.prefix_hash import chain_hash, pack_tokens, prefix_chain, root_hash

TOKENS = st.lists(st.integers(0, 2**31), min_size=8, max_size=40)


def names(token_ids: list[int], salt: str = "", block_size: int = 4) -> list[bytes]:
    return [name for name, _ in prefix_chain(token_ids, block_size, salt, len(token_ids) // block_size)]


@given(TOKENS, TOKENS)
def test_equal_prefixes_share_names_and_the_first_difference_ends_it(left: list[int], right: list[int]) -> None:
    for number, (a, b) in enumerate(zip(names(left), names(right), strict=False)):
        end = (number + 1) * 4
        assert (a == b) == (left[:end] == right[:end])


@given(TOKENS)
def test_salts_separate_every_name(token_ids: list[int]) -> None:
    assert set(names(token_ids, "a")).isdisjoint(names(token_ids, "b"))


def test_a_block_is_named_by_its_position_too() -> None:
    first, second = names([1, 2, 3, 4, 1, 2, 3, 4])
    assert first != second


def test_the_chain_is_lazy_and_continues_by_hand() -> None:
    token_ids = list(range(12))
    chain = prefix_chain(token_ids, 4, "salt", 3)
    name, tokens = next(chain)
    assert name == chain_hash(root_hash("salt"), pack_tokens([0, 1, 2, 3]))
    assert tokens == pack_tokens([0, 1, 2, 3])
    assert next(chain)[0] == chain_hash(name, pack_tokens([4, 5, 6, 7]))


def test_names_come_from_a_cryptographic_hash() -> None:
    """A client that could make two names equal would read another one's KV."""
    root = hashlib.blake2b(b"salt", digest_size=16, person=b"kvrelay prefix").digest()
    assert root_hash("salt") == root
    assert chain_hash(root, pack_tokens([1, 2])) == hashlib.blake2b(root + pack_tokens([1, 2]), digest_size=16).digest()
