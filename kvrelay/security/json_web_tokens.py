"""JWTs as credentials (RFC 7519, RFC 8725): the issuer's public keys lie in a file (RFC 7517).

A token chooses neither its algorithm nor where keys come from.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jwt

from kvrelay.errors import ConfigError, UnauthenticatedError
from kvrelay.security.principal import MAX_TENANT_CHARACTERS, Principal, Role
from kvrelay.security.reloaded_file import ReloadedFile

CLOCK_DIFFERENCE_S = 30
"""Between the issuer and this process."""
MIN_RSA_BITS = 2048
MAX_ID_CHARACTERS = 64
ROLES = frozenset({Role.CLIENT, Role.OPERATOR, Role.METRICS})
"""Other roles in a token do not count."""

_PUBLIC_MEMBERS = {"EC": ("crv", "x", "y"), "RSA": ("n", "e"), "OKP": ("crv", "x")}
_PRIVATE_MEMBERS = {"d", "p", "q", "k"}


@dataclass(frozen=True, slots=True)
class TokenRules:
    issuer: str
    audience: str
    tenant_claim: str
    roles_claim: str


@dataclass(frozen=True, slots=True)
class SigningKey:
    key: Any
    algorithm: str
    proof: str


KeySet = Mapping[str, SigningKey]
"""By `kid`."""


class JsonWebTokens:
    def __init__(self, path: str, rules: TokenRules, clock: Callable[[], float] = time.time) -> None:
        self.file = ReloadedFile(path, "JWKS file", parse_key_set)
        self._rules = rules
        self._clock = clock

    @property
    def live_proofs(self) -> frozenset[str]:
        return frozenset(key.proof for key in self.file.value.values())

    def identify(self, token: str) -> Principal | None:
        if token.count(".") != 2:
            return None
        try:
            signing = self._signing_key(jwt.get_unverified_header(token).get("kid"))
            claims = jwt.decode(
                token,
                signing.key,
                algorithms=[signing.algorithm],
                issuer=self._rules.issuer,
                audience=self._rules.audience,
                options={
                    "require": ["exp", "iss", "aud"],
                    "verify_exp": False,
                    "verify_nbf": False,
                    "verify_iat": False,
                },
            )
        except (jwt.PyJWTError, ValueError, RecursionError):
            raise UnauthenticatedError(
                "the token is not valid here: its signature, issuer, audience or form is wrong; get a new one"
            ) from None
        self._check_times(claims)
        return self._principal_of(claims, signing)

    def _signing_key(self, kid: object) -> SigningKey:
        keys = self.file.value
        if kid is None and len(keys) == 1:
            return next(iter(keys.values()))
        found = keys.get(kid) if isinstance(kid, str) else None
        if found is None:
            raise UnauthenticatedError("the token is signed with a key that is not known here; get a new one")
        return found

    def _check_times(self, claims: dict[str, Any]) -> None:
        now = self._clock()
        expires, begins = claims["exp"], claims.get("nbf", 0)
        if not _is_number(expires) or not _is_number(begins):
            raise UnauthenticatedError("the token has times that are no numbers; get a new one")
        if now < begins - CLOCK_DIFFERENCE_S:
            raise UnauthenticatedError("the token is not valid yet; look at the clocks of its issuer and of the server")
        if now >= expires + CLOCK_DIFFERENCE_S:
            raise UnauthenticatedError("the token has expired; get a new one")

    def _principal_of(self, claims: dict[str, Any], signing: SigningKey) -> Principal:
        roles = _roles_of(_claim(claims, self._rules.roles_claim))
        tenant = _claim(claims, self._rules.tenant_claim)
        if tenant is None and Role.CLIENT in roles:
            raise UnauthenticatedError(
                f"the token names no tenant; its issuer must set the claim {self._rules.tenant_claim}"
            )
        if tenant is not None and not (isinstance(tenant, str) and 0 < len(tenant) <= MAX_TENANT_CHARACTERS):
            raise UnauthenticatedError(f"the token's tenant must be a text of 1 to {MAX_TENANT_CHARACTERS} characters")
        subject = claims.get("sub")
        key_id = f"jwt:{subject[:MAX_ID_CHARACTERS]}" if isinstance(subject, str) else "jwt"
        expires_at_s = claims["exp"] + CLOCK_DIFFERENCE_S
        return Principal(roles, tenant, key_id, proof=signing.proof, expires_at_s=expires_at_s)


def parse_key_set(data: bytes) -> KeySet:
    """Keys of other kinds are passed over, because issuers list keys for other uses too.

    Raises:
        ConfigError: no key can be used, a key is private, or two have one id.
    """
    try:
        entries = json.loads(data)["keys"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError('is no JSON Web Key Set; it looks as {"keys": [...]}') from None
    keys: dict[str, SigningKey] = {}
    for entry in entries if isinstance(entries, list) else ():
        if not isinstance(entry, dict) or (algorithm := _algorithm_of(entry)) is None:
            continue
        if _PRIVATE_MEMBERS & entry.keys():
            raise ConfigError("has a private key; give the issuer's public keys only")
        kid = entry.get("kid", "")
        if not isinstance(kid, str) or kid in keys:
            raise ConfigError("has two keys with one kid, or a kid that is no text")
        keys[kid] = _signing_key_of(entry, algorithm)
    if not keys:
        raise ConfigError("has no public key for ES256, RS256 or EdDSA")
    return keys


def _algorithm_of(entry: dict[str, Any]) -> str | None:
    if entry.get("use", "sig") != "sig":
        return None
    match entry.get("kty"), entry.get("crv"):
        case "EC", "P-256":
            algorithm = "ES256"
        case "RSA", _:
            algorithm = "RS256"
        case "OKP", "Ed25519":
            algorithm = "EdDSA"
        case _:
            return None
    return algorithm if entry.get("alg", algorithm) in (algorithm, "Ed25519") else None


def _signing_key_of(entry: dict[str, Any], algorithm: str) -> SigningKey:
    members = {name: entry.get(name) for name in _PUBLIC_MEMBERS[entry["kty"]]} | {"kty": entry["kty"]}
    try:
        key = jwt.PyJWK(members, algorithm).key
    except (jwt.PyJWTError, ValueError, TypeError, AttributeError):
        raise ConfigError(f"has a key for {algorithm} that cannot be read") from None
    if algorithm == "RS256" and key.key_size < MIN_RSA_BITS:
        raise ConfigError(f"has an RSA key of {key.key_size} bits; at least {MIN_RSA_BITS} are needed")
    thumbprint = hashlib.sha256(json.dumps(members, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return SigningKey(key, algorithm, f"jwt:{thumbprint}")


def _claim(claims: dict[str, Any], name: str) -> object:
    """A claim by its name, or by a path such as `realm_access.roles`."""
    if name in claims:
        return claims[name]
    found: object = claims
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _roles_of(claim: object) -> frozenset[Role]:
    """Without the claim, those of a client."""
    if claim is None:
        return frozenset({Role.CLIENT})
    names = claim.split() if isinstance(claim, str) else claim if isinstance(claim, list) else []
    return frozenset(role for role in ROLES if role.value in names)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
