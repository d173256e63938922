"""JWTs: which are taken, and that no token chooses how it is verified."""

import base64
import json
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from kvrelay.errors import ConfigError, UnauthenticatedError
from kvrelay.security.json_web_tokens import CLOCK_DIFFERENCE_S, JsonWebTokens, TokenRules, parse_key_set
from kvrelay.security.principal import Principal, Role

NOW = 1_800_000_000
RULES = TokenRules("https://issuer", "kvrelay", "tenant", "roles")
EC = ec.generate_private_key(ec.SECP256R1())
RSA = rsa.generate_private_key(65537, 2048)
ED = ed25519.Ed25519PrivateKey.generate()


def jwk(key: Any, kid: str, **more: Any) -> dict[str, Any]:
    kinds: dict[type, Any] = {
        ec.EllipticCurvePrivateKey: jwt.algorithms.ECAlgorithm,
        rsa.RSAPrivateKey: jwt.algorithms.RSAAlgorithm,
        ed25519.Ed25519PrivateKey: jwt.algorithms.OKPAlgorithm,
    }
    to_jwk = next(algorithm.to_jwk for kind, algorithm in kinds.items() if isinstance(key, kind))
    members: dict[str, Any] = json.loads(to_jwk(key.public_key()))
    return members | {"kid": kid} | more


KEY_SET = {"keys": [jwk(EC, "ec"), jwk(RSA, "rsa", use="sig"), jwk(ED, "ed")]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps(KEY_SET))
    return path


@pytest.fixture
def tokens(path: Path) -> JsonWebTokens:
    return JsonWebTokens(str(path), RULES, clock=lambda: NOW)


def token(key: Any = EC, kid: str | None = "ec", algorithm: str = "ES256", **changes: Any) -> str:
    claims = {"iss": "https://issuer", "aud": "kvrelay", "exp": NOW + 60, "sub": "u1", "tenant": "alice"} | changes
    present = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode(present, key, algorithm, headers={"kid": kid} if kid is not None else None)


def identify(tokens: JsonWebTokens, text: str) -> Principal:
    principal = tokens.identify(text)
    assert principal is not None
    return principal


@pytest.mark.parametrize(("key", "kid", "algorithm"), [(EC, "ec", "ES256"), (RSA, "rsa", "RS256"), (ED, "ed", "EdDSA")])
def test_a_token_of_each_algorithm_gives_tenant_and_roles(
    tokens: JsonWebTokens, key: Any, kid: str, algorithm: str
) -> None:
    principal = identify(tokens, token(key, kid, algorithm, roles=["client", "gateway", "other"]))
    assert (principal.tenant, principal.roles, principal.key_id) == ("alice", frozenset({Role.CLIENT}), "jwt:u1")
    assert principal.expires_at_s == NOW + 60 + CLOCK_DIFFERENCE_S
    assert principal.proof in tokens.live_proofs


def test_roles_may_be_a_text_or_lie_deeper_and_default_to_client(tokens: JsonWebTokens, path: Path) -> None:
    assert identify(tokens, token(roles="openid operator", tenant=None)).roles == {Role.OPERATOR}
    assert identify(tokens, token()).roles == {Role.CLIENT}
    assert identify(tokens, token(roles=["viewer"])).roles == frozenset()
    deep = JsonWebTokens(str(path), TokenRules("https://issuer", "kvrelay", "t.name", "t.roles"), lambda: NOW)
    principal = identify(deep, token(t={"name": "bob", "roles": ["client"]}))
    assert (principal.tenant, principal.roles) == ("bob", frozenset({Role.CLIENT}))


@pytest.mark.parametrize(
    "changes",
    [
        {"iss": "https://other"},
        {"iss": None},
        {"aud": "other"},
        {"aud": None},
        {"exp": None},
        {"exp": NOW - CLOCK_DIFFERENCE_S},
        {"exp": True},
        {"nbf": NOW + CLOCK_DIFFERENCE_S + 1},
        {"tenant": None},
        {"tenant": ""},
        {"tenant": ["alice"]},
        {"tenant": "t" * 200},
        {"kid": "other"},
        {"kid": None},
        {"kid": "rsa"},
        {"key": ec.generate_private_key(ec.SECP256R1())},
        {"key": RSA, "algorithm": "RS256"},
        {"key": RSA, "algorithm": "RS512", "kid": "rsa"},
        {"key": RSA, "algorithm": "PS256", "kid": "rsa"},
        {"key": "", "algorithm": "none"},
    ],
)
def test_a_token_that_is_not_as_it_must_be_is_refused(tokens: JsonWebTokens, changes: dict[str, Any]) -> None:
    text = token(**changes)
    with pytest.raises(UnauthenticatedError) as refused:
        tokens.identify(text)
    assert text.split(".")[2] not in refused.value.message or not text.split(".")[2]


def test_a_public_key_is_no_secret_for_hmac(tokens: JsonWebTokens) -> None:
    pem = RSA.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    header, claims = encode({"alg": "HS256", "kid": "rsa"}), token().split(".")[1]
    signature = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256).sign(
        f"{header}.{claims}".encode(), pem
    )
    with pytest.raises(UnauthenticatedError):
        tokens.identify(f"{header}.{claims}.{encode_bytes(signature)}")


def encode_bytes(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def encode(value: Any) -> str:
    return encode_bytes(json.dumps(value).encode())


@pytest.mark.parametrize(
    "text",
    [
        "..",
        "a.b.c",
        "\udcff.b.c",
        f"{encode([])}.e30.AA",
        f"{encode_bytes(b'[' * 5000)}.e30.AA",
        f"{encode({'kid': []})}.e30.A",
    ],
)
def test_what_only_looks_like_a_token_is_refused(tokens: JsonWebTokens, text: str) -> None:
    with pytest.raises(UnauthenticatedError):
        tokens.identify(text)


def test_other_credentials_are_left_to_others(tokens: JsonWebTokens) -> None:
    assert tokens.identify("kvr_key") is None


def test_clocks_may_differ_a_little(tokens: JsonWebTokens) -> None:
    late, early = token(exp=NOW - CLOCK_DIFFERENCE_S + 1), token(nbf=NOW + CLOCK_DIFFERENCE_S)
    assert identify(tokens, late).tenant == identify(tokens, early).tenant == "alice"


def test_a_removed_key_takes_its_tokens_with_it(tokens: JsonWebTokens, path: Path) -> None:
    principal = identify(tokens, token())
    path.write_text(json.dumps({"keys": [jwk(RSA, "rsa")]}))
    assert [tokens.file.poll(), tokens.file.poll()] == [False, True]
    assert principal.proof not in tokens.live_proofs
    with pytest.raises(UnauthenticatedError):
        tokens.identify(token())


def test_keys_for_other_uses_are_passed_over() -> None:
    others = [{"kty": "oct", "k": "AAAA", "kid": "o"}, jwk(RSA, "e", use="enc"), jwk(EC, "x", alg="ES512"), "text"]
    assert set(parse_key_set(json.dumps({"keys": [*others, jwk(EC, "ec")]}).encode())) == {"ec"}


SMALL = rsa.generate_private_key(65537, 1024)


@pytest.mark.parametrize(
    "key_set",
    [
        [],
        {},
        {"keys": []},
        {"keys": None},
        {"keys": [{"kty": "oct", "k": "AAAA"}]},
        {"keys": [jwk(EC, "a"), jwk(RSA, "a")]},
        {"keys": [jwk(SMALL, "small")]},
        {"keys": [jwk(EC, "a", d="AAAA")]},
        {"keys": [jwk(EC, "a", x="AAAA")]},
        {"keys": [jwk(EC, "a", x=None)]},
        {"keys": [jwk(EC, "a") | {"kid": 1}]},
    ],
)
def test_a_key_set_that_is_not_as_it_must_be_is_refused(key_set: Any) -> None:
    with pytest.raises(ConfigError):
        parse_key_set(json.dumps(key_set).encode())
