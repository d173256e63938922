"""What a process advertises that listens on all addresses: something that leads to it, whatever the
host's name does.
"""

import socket
from collections.abc import Callable

import pytest

from kvrelay.config.settings import ServerSettings
from kvrelay.network import own_address as module
from kvrelay.network.host_port import split_host_port
from kvrelay.network.listening import ANY_HOST, bind_sockets
from kvrelay.network.own_address import LOOPBACK, own_address

ON_LOOPBACK = ["redis://127.0.0.1:6379/0", "redis://localhost/0", "unix:///run/redis.sock?db=1", None]
FOREIGN = "198.51.100.77"
REDIS = "10.9.0.1"
NAME = "kvrelay-decode-7d9c8-xk2lp"

Name = Callable[..., None]


@pytest.fixture
def name(monkeypatch: pytest.MonkeyPatch) -> Name:
    """Gives this host a name that resolves to so many addresses; names for Redis resolve to its
    address, others to nothing.
    """
    resolve = socket.getaddrinfo

    def set_name(*addresses: str) -> None:
        known = {NAME: addresses, "redis.example": (REDIS,), "localhost": (LOOPBACK,)}

        def fake_resolve(host: str, *arguments: object, **options: object) -> object:
            if known.get(host):
                return [entry for address in known[host] for entry in resolve(address, *arguments, **options)]  # type: ignore[arg-type]
            if host == NAME or host.endswith(".example"):
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            return resolve(host, *arguments, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(socket, "getaddrinfo", fake_resolve)
        monkeypatch.setattr(socket, "gethostname", lambda: NAME)

    return set_name


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Says from which address this machine sends to others; those that are not named cannot be
    reached.
    """

    def set_ways(sources: dict[str, str]) -> None:
        monkeypatch.setattr(module, "_source_towards", sources.get)

    return set_ways


@pytest.mark.parametrize("redis_url", ON_LOOPBACK)
@pytest.mark.parametrize("host", ANY_HOST)
@pytest.mark.parametrize(
    "addresses", [(), (FOREIGN,), (LOOPBACK, FOREIGN)], ids=["nothing", "somebody else", "partly others"]
)
def test_a_host_whose_name_does_not_lead_to_it_is_reached_all_the_same(
    addresses: tuple[str, ...], host: str, redis_url: str | None, name: Name
) -> None:
    name(*addresses)
    (listening,) = bind_sockets(host, 0, "--port")
    with listening:
        listening.listen()
        address, port = split_host_port(
            ServerSettings(host=host, redis_url=redis_url).address_of(listening.getsockname()[1])
        )
        assert address != NAME
        with socket.create_connection((address, port), timeout=30):
            pass


@pytest.mark.parametrize("redis_url", ON_LOOPBACK)
def test_a_name_that_leads_here_is_advertised_where_redis_is_on_loopback(redis_url: str | None, name: Name) -> None:
    name(LOOPBACK)
    assert own_address(redis_url) == NAME


@pytest.mark.parametrize(
    "redis_url",
    [f"redis://{REDIS}:6379/0", "rediss://user:secret@redis.example:6380/2", f"redis+cluster://{REDIS}:1,other:2"],
)
def test_with_redis_elsewhere_the_address_towards_it_is_advertised(
    redis_url: str, name: Name, ways: Callable[[dict[str, str]], None]
) -> None:
    name(LOOPBACK)
    ways({REDIS: "10.9.0.5", "192.0.2.1": "172.17.0.2"})
    assert own_address(redis_url) == "10.9.0.5"


def test_an_ipv6_address_towards_redis_stands_in_brackets(name: Name, ways: Callable[[dict[str, str]], None]) -> None:
    name()
    ways({"fd00::1": "fd00::5"})
    assert ServerSettings(host="::", redis_url="redis://[fd00::1]:6379/0").address_of(50051) == "[fd00::5]:50051"


def test_a_redis_whose_name_is_not_known_yet_stops_nothing(name: Name, ways: Callable[[dict[str, str]], None]) -> None:
    name()
    ways({"192.0.2.1": "10.1.0.2"})
    assert own_address("redis://not-yet.example:6379/0") == "10.1.0.2"


def test_a_machine_without_any_network_is_reached_on_loopback(
    name: Name, ways: Callable[[dict[str, str]], None]
) -> None:
    name()
    ways({})
    assert own_address("redis://127.0.0.1:6379/0") == LOOPBACK


@pytest.mark.parametrize("address", [LOOPBACK, "127.0.1.1", "::1"])
def test_loopback_is_no_way_by_which_others_reach_this_machine(address: str) -> None:
    assert module._source_towards(address) is None
