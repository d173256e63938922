"""Makes a cluster's certificates and passwords, and keeps them in Secrets of Kubernetes.

    python publish_credentials.py --prefix NAME --namespace NAMESPACE [--trust-domain DOMAIN] HOST ...

Secret NAME-ROLE is what pods of one role see: a certificate with its key and the CA, and the password
for Redis where the role needs one. NAME-authority has the CA's key, and no pod but this one reads it.
What is there stays; `make_credentials` says when certificates are made anew.
"""

import argparse
import base64
import http.client
import json
import os
import secrets
import ssl
import tempfile
from pathlib import Path
from typing import Any

from make_credentials import make_credentials

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
ROLES = ("authority", "redis", "gateway", "prefill", "decode", "front", "metrics", "operator")
CACHE_SECRET = "cache-secret"
TIMEOUT_S = 20.0


class Secrets:
    """Of one namespace, by the API of the cluster that this pod runs in."""

    def __init__(self, namespace: str, account: Path = ACCOUNT) -> None:
        self._path = f"/api/v1/namespaces/{namespace}/secrets"
        self._account = account
        self._tls = ssl.create_default_context(cafile=str(account / "ca.crt"))

    def get(self, name: str) -> dict[str, Any] | None:
        status, body = self._call("GET", f"{self._path}/{name}")
        if status == 404:
            return None
        return _checked(status, body, (200,))

    def put(self, name: str, known: dict[str, Any] | None, files: dict[str, bytes]) -> None:
        """Fails if another has changed the Secret meanwhile."""
        data = {file: base64.b64encode(content).decode() for file, content in files.items()}
        if known is not None:
            if known.get("data") == data:
                return
            status, body = self._call("PUT", f"{self._path}/{name}", {**known, "data": data})
        else:
            metadata = {"name": name, "labels": {"app.kubernetes.io/name": "kvrelay"}}
            secret = {"apiVersion": "v1", "kind": "Secret", "type": "Opaque", "metadata": metadata, "data": data}
            status, body = self._call("POST", self._path, secret)
        _checked(status, body, (200, 201))

    def _call(self, method: str, path: str, value: object = None) -> tuple[int, bytes]:
        host, port = os.environ["KUBERNETES_SERVICE_HOST"], int(os.environ["KUBERNETES_SERVICE_PORT"])
        connection = http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=self._tls)
        try:
            body = None if value is None else json.dumps(value)
            token = (self._account / "token").read_text().strip()
            headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


def publish(store: Secrets, prefix: str, trust_domain: str, hosts: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        known = {role: store.get(f"{prefix}-{role}") for role in ROLES}
        for role, secret in known.items():
            (folder / role).mkdir(mode=0o700)
            for file, content in ((secret or {}).get("data") or {}).items():
                (folder / role / file).write_bytes(base64.b64decode(content))
        make_credentials(folder, trust_domain, hosts)
        if not (folder / "gateway" / CACHE_SECRET).exists():
            (folder / "gateway" / CACHE_SECRET).write_text(secrets.token_hex(32))
        for role in ROLES:  # the authority first: nothing is lost if this ends in between
            files = {path.name: path.read_bytes() for path in sorted((folder / role).iterdir())}
            store.put(f"{prefix}-{role}", known[role], files)


def _checked(status: int, body: bytes, expected: tuple[int, ...]) -> dict[str, Any]:
    if status not in expected:
        raise SystemExit(f"the API answered {status}: {body[:500].decode(errors='replace')}")
    parsed: dict[str, Any] = json.loads(body)
    return parsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", required=True)
    parser.add_argument("--namespace", required=True)
    parser.add_argument("--trust-domain", default="kvrelay.local")
    parser.add_argument("hosts", nargs="*")
    given = parser.parse_args()
    publish(Secrets(given.namespace), given.prefix, given.trust_domain, tuple(given.hosts))


if __name__ == "__main__":
    main()
