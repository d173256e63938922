"""Whether this machine can listen on IPv6. Containers often cannot."""

import socket

import pytest

from tests.support.left_out import not_for


def _has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


HAS_IPV6 = _has_ipv6()
needs_ipv6 = pytest.mark.skipif(not HAS_IPV6, reason=not_for("machines without IPv6"))
