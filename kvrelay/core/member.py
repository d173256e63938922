"""The processes of a cluster. Pure."""

from dataclasses import dataclass
from enum import Enum


class MemberRole(Enum):
    GATEWAY = "gateway"
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Member:
    """A process with a lease. A restarted process is another member."""

    instance_id: str
    role: MemberRole
    address: str
    model: str = ""
    fingerprint: str = ""
