"""For whom a request asks for a place, and within which limits. Pure."""

from dataclasses import dataclass, field

from kvrelay.security.principal import LOCAL, Limits


@dataclass(frozen=True, slots=True)
class Caller:
    key_id: str = LOCAL.key_id
    share: str = ""
    """The tenant, which gets its share of a full gateway."""
    limits: Limits = field(default_factory=Limits)
    """None in it is as much as the gateway has."""
    waits: bool = False
    """Whether it waits for a place while all are taken."""
