"""The keys file: hashes of API keys, and what each key may do. docs/reference/roles.md shows one.

Keys are random, so that one round of SHA-256 hides them as well as a slow hash.
"""

import datetime
import hashlib
import hmac
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kvrelay.errors import ConfigError
from kvrelay.security.principal import MAX_TENANT_CHARACTERS, Limits, Principal, Role
from kvrelay.security.reloaded_file import ReloadedFile

KEY_BYTES = 32
KEY_PREFIX = "kvr_"
"""Lets scanners for leaked secrets find keys."""

TenantName = Annotated[str, Field(min_length=1, max_length=MAX_TENANT_CHARACTERS)]
Count = Annotated[int, Field(ge=0)]
KeyRole = Literal["client", "operator", "metrics", "front"]
"""The other roles are proven by certificates only."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class KeyLimits(_Strict):
    running_requests: Count | None = None
    queued_prompt_tokens: Count | None = None
    output_tokens_per_minute: Count | None = None
    formats_per_minute: Count | None = None
    stored_bytes: Count | None = None
    unattended_requests: Count | None = None
    weight: int = Field(default=1, ge=1, le=1000)


class KeyEntry(_Strict):
    id: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    tenant: TenantName | None = None
    roles: list[KeyRole] = Field(default=["client"], min_length=1)
    limits: KeyLimits = KeyLimits()
    expires: datetime.datetime | datetime.date | None = None
    tenants: list[TenantName] = []

    @model_validator(mode="after")
    def _names_its_tenants(self) -> "KeyEntry":
        if self.tenant is None and {"client", "front"} & set(self.roles):
            raise ValueError("tenant is missing: roles client and front act for one")
        if self.tenants and "front" not in self.roles:
            raise ValueError("tenants are for role front")
        return self


class _Contents(_Strict):
    keys: list[KeyEntry]


@dataclass(frozen=True, slots=True)
class KeyRing:
    by_digest: Mapping[str, Principal]
    proofs: frozenset[str]

    def find(self, key: str) -> Principal | None:
        digest = digest_of(key)
        found = self.by_digest.get(digest)
        # The time of the look-up tells of digests only, from which no key is found.
        if found is None or not hmac.compare_digest(found.proof.partition(":")[0], digest):
            return None
        return found


class KeysFile:
    def __init__(self, path: str) -> None:
        self.file = ReloadedFile(path, "keys file", parse_keys)

    def identify(self, token: str) -> Principal | None:
        return self.file.value.find(token)

    @property
    def live_proofs(self) -> frozenset[str]:
        return self.file.value.proofs


def new_key() -> str:
    return KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def parse_keys(data: bytes) -> KeyRing:
    """Raises ConfigError; its message names the entry and never a value."""
    try:
        contents = _Contents.model_validate(yaml.safe_load(data))
    except yaml.YAMLError as failure:
        raise ConfigError(f"is no YAML: {_place_of(failure)}") from None
    except (ValueError, RecursionError) as failure:
        raise ConfigError(_first_problem(failure)) from None
    by_digest: dict[str, Principal] = {}
    ids: set[str] = set()
    for entry in contents.keys:
        if entry.id in ids or entry.sha256 in by_digest:
            raise ConfigError(f"has two entries with the id {entry.id}, or with its sha256; remove one")
        ids.add(entry.id)
        by_digest[entry.sha256] = _principal_of(entry)
    return KeyRing(by_digest, frozenset(principal.proof for principal in by_digest.values()))


def _principal_of(entry: KeyEntry) -> Principal:
    roles = frozenset(Role(role) for role in entry.roles)
    # A key that gets another tenant or fewer roles is withdrawn as it was.
    rights = json.dumps([entry.id, entry.tenant, sorted(roles), sorted(entry.tenants)])
    return Principal(
        roles=roles,
        tenant=entry.tenant,
        key_id=entry.id,
        limits=Limits(**entry.limits.model_dump()),
        front_tenants=frozenset(entry.tenants),
        proof=f"{entry.sha256}:{rights}",
        expires_at_s=None if entry.expires is None else _timestamp(entry.expires),
    )


def _timestamp(time: datetime.datetime | datetime.date) -> float:
    """Without a zone, in UTC; a date begins at midnight."""
    if not isinstance(time, datetime.datetime):
        time = datetime.datetime.combine(time, datetime.time())
    return (time if time.tzinfo is not None else time.replace(tzinfo=datetime.UTC)).timestamp()


def _first_problem(failure: Exception) -> str:
    if not isinstance(failure, ValidationError):
        return "cannot be read as YAML"
    first: Any = failure.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"])) or "the file"
    return f"is wrong at {place}: {first['msg']}; entries look as in docs/reference/roles.md"


def _place_of(failure: yaml.YAMLError) -> str:
    mark = getattr(failure, "problem_mark", None)
    return "it cannot be read" if mark is None else f"look at line {mark.line + 1}"
