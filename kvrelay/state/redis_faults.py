"""Explains errors of Redis, and on the way to it. Others are kvrelay's own defects."""

import re
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass

import redis.exceptions
from redis.asyncio.sentinel import MasterNotFoundError

MAX_QUOTED_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class RedisFault:
    sentence: str
    """For a log and `kvrelay health`: what to do. No secret, no address."""
    needs_a_person: bool = False
    """A setting of Redis or of kvrelay must change."""
    is_refusal: bool = False  # Redis answered


CLUSTER_SENTENCE = (
    "Redis at --redis-url is a node of a Redis Cluster, whose keys are spread over several nodes: write "
    "redis+cluster://HOST:PORT, with several HOST:PORT by commas, so that kvrelay follows them"
)
NO_CLUSTER_SENTENCE = (
    "Redis at --redis-url is no Redis Cluster: write redis:// instead of redis+cluster://, and one host"
)
NOT_COVERED_SENTENCE = (
    "the Redis Cluster of --redis-url has slots that no node serves: CLUSTER INFO there says how many"
)
SENTINEL_SENTENCE = (
    "what listens at --redis-url is a Redis Sentinel: write redis+sentinel://HOST:26379/SERVICE with the name under "
    "which it watches the primary"
)
NO_SENTINEL_SENTENCE = (
    "what listens at the hosts of --redis-url is no Sentinel: write redis:// for a Redis itself, or give the port of "
    "the Sentinels, such as redis+sentinel://HOST:26379/SERVICE"
)
OTHER_SERVICE_SENTENCE = "no Sentinel of --redis-url watches a primary by the name in it"
NO_PRIMARY_SENTENCE = "no Sentinel of --redis-url knows a primary that is up"
SENTINEL_PASSWORD_SENTENCE = (
    "the Sentinels refuse the user or the password for them: give theirs in --sentinel-pass-file, or leave "
    "it out if they have none"
)
SENTINEL_RIGHTS_SENTENCE = (
    "the user for the Sentinels may not ask them for the primary: ACL SETUSER <user> +@connection +sentinel|masters"
)
OLD_SENTENCE = "Redis at --redis-url is too old: kvrelay needs Redis 7.0 or newer, or Valkey"
NEEDS_TLS_SENTENCE = "the port of --redis-url speaks TLS: write rediss:// instead of redis://"
NO_TLS_SENTENCE = (
    "the port of --redis-url does not speak TLS: write redis:// instead of rediss://, or give its TLS port"
)
NO_ANSWER_SENTENCE = "Redis does not answer in time"
BROKEN_SENTENCE = "the connection to Redis broke"
_OTHER_NAME_CODES = (62, 64)
"""OpenSSL's, for a host and an address that the certificate does not name."""
_REFUSED_CERTIFICATES = tuple(
    f"ALERT_{what}"
    for what in ("UNKNOWN_CA", "BAD_CERTIFICATE", "CERTIFICATE_EXPIRED", "CERTIFICATE_REVOKED", "CERTIFICATE_UNKNOWN")
)
_PERMISSIONS = "~kvrelay:* +@read +@write +@scripting +@connection +info +time, and in a Redis Cluster +cluster|slots"

NO_CLUSTER = RedisFault(NO_CLUSTER_SENTENCE, needs_a_person=True, is_refusal=True)

# By the first word of an answer.
_BY_CODE: dict[str, RedisFault] = {
    code: RedisFault(sentence, needs_a_person=False, is_refusal=True)
    for code, sentence in {
        "LOADING": "Redis is loading its data",
        "BUSY": "a script keeps Redis busy; SCRIPT KILL ends it",
        "UNKILLABLE": "a script that has written keeps Redis busy; it must end, or Redis be restarted",
        "NOTBUSY": "a script that kept Redis busy has just ended",
        "NOREPLICAS": "Redis takes no writes, for too few replicas follow it (min-replicas-to-write)",
        "MISCONF": "Redis takes no writes, for it cannot save to its disk; its log says why",
        "READONLY": "Redis at --redis-url is a replica and takes no writes; give the address of the primary",
        "MASTERDOWN": "Redis at --redis-url is a replica that has lost its primary; give the address of the primary",
        "CLUSTERDOWN": "the Redis Cluster of --redis-url is down",
        "TRYAGAIN": "the Redis Cluster of --redis-url is moving keys",
        "EXECABORT": "Redis has given up a transaction",
        "OOM": "Redis is out of memory",
    }.items()
} | {
    code: RedisFault(sentence, needs_a_person=True, is_refusal=True)
    for code, sentence in {
        "MOVED": CLUSTER_SENTENCE,
        "ASK": CLUSTER_SENTENCE,
        "CROSSSLOT": CLUSTER_SENTENCE,
        "NOAUTH": "Redis wants a password: give it in --redis-password-file, or in --redis-url as "
        "redis://USER:PASSWORD@HOST:PORT/0",
        "WRONGPASS": "Redis refuses the user or the password of --redis-url",
        "NOPERM": f"the Redis user of --redis-url may not do all that kvrelay needs: ACL SETUSER <user> {_PERMISSIONS}",
        "DENIED": "Redis runs in protected mode and takes only connections from its own host: give it a password, "
        "or set protected-mode no where its network is trusted",
    }.items()
}

# By a part of an answer that has no code of its own.
_BY_TEXT: tuple[tuple[str, RedisFault], ...] = (
    ("max number of clients reached", RedisFault("Redis has no room for another client (maxclients)", False, True)),
    ("Error compiling script", RedisFault(OLD_SENTENCE, True, True)),
    ("script shebang", RedisFault(OLD_SENTENCE, True, True)),
    (
        "not allowed in cluster mode",
        RedisFault("a Redis Cluster has database 0 only: change it in --redis-url", True, True),
    ),
    (
        "Unknown Redis command called from script",
        RedisFault("Redis does not know a command that kvrelay needs: it was renamed or disabled", True, True),
    ),
    ("DB index", RedisFault("Redis has no database of the number in --redis-url", True, True)),
    ("without any password", RedisFault("Redis has no password, so --redis-url must have none", True, True)),
    ("no password is set", RedisFault("Redis has no password, so --redis-url must have none", True, True)),
    ("invalid password", RedisFault("Redis refuses the user or the password of --redis-url", True, True)),
    ("operation not permitted", RedisFault("Redis wants a password: give it in --redis-url", True, True)),
)

# Parts of answers to wrong commands.
_DEFECTS = (
    "user_script",
    "wrong number of arg",
    "syntax error",
    "is not an integer",
    "is not a valid float",
    "unknown subcommand",
    "invalid stream id",
    "min or max is not",
)

_CODES_OF_CLASSES: tuple[tuple[type[Exception], str], ...] = (
    (redis.exceptions.MovedError, "MOVED"),
    (redis.exceptions.AskError, "ASK"),
    (redis.exceptions.MasterDownError, "MASTERDOWN"),
    (redis.exceptions.ClusterDownError, "CLUSTERDOWN"),
    (redis.exceptions.ClusterCrossSlotError, "CROSSSLOT"),
    (redis.exceptions.TryAgainError, "TRYAGAIN"),
    (redis.exceptions.ReadOnlyError, "READONLY"),
    (redis.exceptions.NoPermissionError, "NOPERM"),
    (redis.exceptions.OutOfMemoryError, "OOM"),
    (redis.exceptions.ExecAbortError, "EXECABORT"),
    (redis.exceptions.BusyLoadingError, "LOADING"),
)


def fault_of(error: BaseException) -> RedisFault | None:
    """The meaning of an error; None for a defect of the command itself."""
    if isinstance(error, redis.exceptions.ConnectionError) and isinstance(error.__cause__, redis.exceptions.RedisError):
        error = error.__cause__  # through a Unix socket, redis-py wraps the server's refusal
    if isinstance(error, MasterNotFoundError):
        return RedisFault(NO_PRIMARY_SENTENCE)
    if isinstance(error, redis.exceptions.RedisClusterException):
        return _fault_of_cluster(error)
    answer = _answer_of(error)
    if answer is not None:
        return _fault_of_answer(*answer)
    if isinstance(error, redis.exceptions.InvalidResponse):
        return RedisFault(
            "what listens at --redis-url is no Redis: its answer is none of Redis's protocol", needs_a_person=True
        )
    if isinstance(error, OSError | redis.exceptions.ConnectionError | redis.exceptions.TimeoutError):
        return _fault_on_the_way(error)
    return None


def _fault_of_cluster(error: redis.exceptions.RedisClusterException) -> RedisFault | None:
    """redis-py's own errors about a cluster; those about a command are defects."""
    text = str(error)
    if isinstance(error, redis.exceptions.SlotNotCoveredError) or "not covered" in text:
        return RedisFault(NOT_COVERED_SENTENCE)
    causes = [cause for cause in _causes(error) if not isinstance(cause, redis.exceptions.RedisClusterException)]
    faults = [fault for cause in causes if (fault := fault_of(cause)) is not None]
    if "Cluster mode is not enabled" in text:
        return next((fault for fault in faults if fault.needs_a_person), NO_CLUSTER)
    if "cannot be connected" in text:
        return next(iter(faults), RedisFault(BROKEN_SENTENCE))
    return None


def _answer_of(error: BaseException) -> tuple[str, str] | None:
    text = " ".join(str(error).split())
    for kind, code in _CODES_OF_CLASSES:
        if isinstance(error, kind):
            return code, text
    if isinstance(error, redis.exceptions.AuthenticationError):
        return getattr(error, "status_code", None) or _guessed_code(text), text
    if isinstance(error, redis.exceptions.ConnectionError) and "max number of clients" in text:
        return "ERR", text
    if not isinstance(error, redis.exceptions.ResponseError):
        return None
    if (kept := getattr(error, "status_code", None)) is not None:
        return str(kept), text
    # redis-py knows no class for it, and leaves the code in the text.
    first, _, rest = text.partition(" ")
    return (first, rest) if first.isupper() else ("ERR", text)


def _guessed_code(text: str) -> str:
    """Older redis-py versions do not keep the code of an AuthenticationError."""
    if "without any password" in text or "no password is set" in text:
        return "ERR"
    return "NOAUTH" if "required" in text else "WRONGPASS"


def _fault_of_answer(code: str, text: str) -> RedisFault | None:
    # A command within a script has no code of its own for it.
    if "ACL failure in script" in text:
        code = "NOPERM"
    if code == "NOPERM" and (
        what := re.search(r"'([\w|\-]{1,40})' command|access (?:a|one of the) (key|channel)", text)
    ):
        detail = f"the command {what[1].upper()}" if what[1] else f"the {what[2]}s that it uses"
        return RedisFault(f"{_BY_CODE[code].sentence} (it lacks {detail})", needs_a_person=True, is_refusal=True)
    if code in _BY_CODE:
        return _BY_CODE[code]
    for sign, fault in _BY_TEXT:
        if sign in text:
            return fault
    if command := re.search(r"unknown command [`']?([\w\-]{1,40})", text, re.IGNORECASE):
        return RedisFault(
            f"Redis does not know the command {command[1].upper()}, which kvrelay needs: it was renamed or "
            "disabled, or a proxy does not pass it on",
            needs_a_person=True,
            is_refusal=True,
        )
    if code == "ERR" and any(sign in text.lower() for sign in _DEFECTS):
        return None
    if code in ("WRONGTYPE", "NOSCRIPT"):
        return None
    return RedisFault(f"Redis refuses: {code} {_without_arguments(text)}", is_refusal=True)


def _without_arguments(text: str) -> str:
    """Some answers quote what they were sent, which may be a password."""
    return re.split(r",? with args|'", text, maxsplit=1)[0][:MAX_QUOTED_CHARACTERS]


def _fault_on_the_way(error: BaseException) -> RedisFault:
    for cause in _causes(error):
        if (fault := _fault_of_cause(cause)) is not None:
            return fault
    if isinstance(error, redis.exceptions.TimeoutError):
        return RedisFault(NO_ANSWER_SENTENCE)
    return RedisFault(BROKEN_SENTENCE)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes, innermost first."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    yield from reversed(chain)


def _fault_of_cause(cause: BaseException) -> RedisFault | None:
    match cause:
        case ssl.SSLCertVerificationError():
            is_other_name = getattr(cause, "verify_code", None) in _OTHER_NAME_CODES
            advice = "dial it by a name of its certificate" if is_other_name else "give its CA as --redis-tls-ca"
            return RedisFault(
                f"Redis's certificate does not verify ({getattr(cause, 'verify_message', 'no reason given')}): "
                f"{advice}",
                needs_a_person=True,
            )
        case ssl.SSLError() if cause.reason == "WRONG_VERSION_NUMBER":
            return RedisFault(NO_TLS_SENTENCE, needs_a_person=True)
        case ssl.SSLError() if "CERTIFICATE_REQUIRED" in str(cause.reason):
            advice = "give --redis-tls-cert and --redis-tls-key"
            return RedisFault(f"Redis wants a certificate of its clients: {advice}", needs_a_person=True)
        case ssl.SSLError() if any(word in str(cause.reason) for word in _REFUSED_CERTIFICATES):
            said = str(cause.reason).rpartition("ALERT_")[2].replace("_", " ").lower()
            return RedisFault(
                f"Redis refuses the certificate of --redis-tls-cert ({said}): give one that a CA of Redis's "
                "tls-ca-cert-file has signed and that has not expired",
                needs_a_person=True,
            )
        case ssl.SSLError():
            return RedisFault(f"TLS with Redis fails ({cause.reason or type(cause).__name__})")
        case socket.gaierror():
            return RedisFault(f"the host of --redis-url is not known ({cause.strerror})")
        case ConnectionRefusedError():
            return RedisFault("nothing listens at the address of --redis-url (connection refused)")
        case FileNotFoundError():
            return RedisFault("the socket or a certificate's file of --redis-url is not there")
        case PermissionError():
            return RedisFault("this process may not open the socket of --redis-url (permission denied)")
        case ConnectionResetError() | BrokenPipeError():
            return RedisFault(BROKEN_SENTENCE)
        case TimeoutError():
            return RedisFault(NO_ANSWER_SENTENCE)
        case OSError() if cause.strerror:
            return RedisFault(f"Redis cannot be reached ({cause.strerror})")
    return None
