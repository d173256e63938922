"""The chart in deploy/helm: what it makes is valid, fits the processes, and serves.

`make k8s` brings helm and the schemas of Kubernetes; real processes stand in for pods.
"""

import asyncio
import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509

from kvrelay import __version__
from kvrelay.client import TLS, AsyncClient
from kvrelay.config.sources import SECTIONS, setting_fields
from kvrelay.testing.waiting import wait_until
from tests.support import left_out
from tests.support.container_processes import ContainerProcesses
from tests.support.tiny_models import make_tiny_model

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy/helm/kvrelay"
TOOLS = ROOT / "build/k8s"
PREFIX, NAMESPACE, DOMAIN = "r-kvrelay", "serving", "kvrelay.local"
TIMEOUT_S = 240.0
KEYS = "gateway.keysSecret=keys"
VALUES: dict[str, list[str]] = {
    "defaults": [],
    "everything": [
        KEYS,
        "openai.enabled=true",
        "metrics.podMonitor.enabled=true",
        "prefill.autoscaling.enabled=true",
        "decode.autoscaling.enabled=true",
        "tracing.otlpEndpoint=http://collector:4318",
        "image.pullSecrets[0].name=pull",
        "modelStore.hubTokenSecret=hub",
        "networkPolicies.metrics[0].podSelector.matchLabels.app=prometheus",
        "gateway.hosts[0]=relay.example.com",
    ],
    "two models on GPUs": [
        "models[0].name=org/one",
        "models[1].name=org/two",
        "models[1].decode.replicas=3",
        "prefill.gpu=true",
        "decode.gpu=true",
        "decode.runtimeClassName=nvidia",
        "modelStore.existingClaim=models",
    ],
    "Redis elsewhere": [
        "redis.enabled=false",
        "redis.urlOfGateways=rediss://gateway@redis.example:6379/0",
        "redis.urlOfWorkers=rediss://worker@redis.example:6379/0",
        "redis.existingSecret=passwords",
    ],
    "cert-manager and KEDA": [
        "credentials.certManager.enabled=true",
        "credentials.certManager.issuerRef.name=ca",
        "decode.autoscaling.enabled=true",
        "metrics.prometheusAddress=http://prometheus:9090",
    ],
}


class Store:
    """Secrets, in place of the API."""

    def __init__(self) -> None:
        self.secrets: dict[str, dict[str, Any]] = {}
        self.num_writes = 0

    def get(self, name: str) -> dict[str, Any] | None:
        return self.secrets.get(name)

    def put(self, name: str, known: dict[str, Any] | None, files: dict[str, bytes]) -> None:
        secret = {"data": {file: base64.b64encode(content).decode() for file, content in files.items()}}
        if secret != known:
            self.num_writes += 1
            self.secrets[name] = secret

    def files(self, name: str) -> dict[str, bytes]:
        return {file: base64.b64decode(content) for file, content in self.secrets[name]["data"].items()}


def publish(store: Store, *hosts: str) -> None:
    script = """
import sys
sys.path[:0] = sys.argv[1:3]
import base64, json
import publish_credentials
from tests.project.test_helm_chart import Store
store = Store()
store.secrets = json.load(sys.stdin)
publish_credentials.publish(store, sys.argv[3], sys.argv[4], tuple(sys.argv[5:]))
json.dump([store.secrets, store.num_writes], sys.stdout)
"""
    folders = [str(CHART / "files"), str(ROOT / "deploy/compose")]
    done = subprocess.run(
        [sys.executable, "-c", script, *folders, PREFIX, DOMAIN, *hosts],
        input=json.dumps(store.secrets),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    store.secrets, store.num_writes = json.loads(done.stdout)


def certificate_of(store: Store, role: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate(store.files(f"{PREFIX}-{role}")["certificate.pem"])


def hosts_of(certificate: x509.Certificate) -> list[str]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return names.get_values_for_type(x509.DNSName)


def test_credentials_are_made_once_and_certificates_again_when_a_host_is_new() -> None:
    store = Store()
    publish(store, f"{PREFIX}-gateway.{NAMESPACE}.svc")
    first = {name: store.files(name) for name in store.secrets}
    assert store.num_writes == len(first) == 8
    for role in ("gateway", "prefill", "decode"):
        assert first[f"{PREFIX}-{role}"].keys() >= {"ca.pem", "certificate.pem", "certificate.key", "redis-password"}
        assert not first[f"{PREFIX}-{role}"].keys() & {"ca.key", "users.acl"}
    assert len(first[f"{PREFIX}-gateway"]["cache-secret"]) >= 16
    assert f"{PREFIX}-gateway.{NAMESPACE}.svc" in hosts_of(certificate_of(store, "gateway"))

    publish(store, f"{PREFIX}-gateway.{NAMESPACE}.svc")
    assert store.num_writes == 0
    publish(store, "relay.example.com")
    assert {*hosts_of(certificate_of(store, "gateway"))} >= {"relay.example.com", f"{PREFIX}-gateway.{NAMESPACE}.svc"}
    for role in ("gateway", "prefill", "decode"):
        now = store.files(f"{PREFIX}-{role}")
        assert now["ca.pem"] == first[f"{PREFIX}-{role}"]["ca.pem"]
        assert now["redis-password"] == first[f"{PREFIX}-{role}"]["redis-password"]
        assert now["certificate.pem"] != first[f"{PREFIX}-{role}"]["certificate.pem"]


def test_the_chart_has_the_projects_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text("utf-8"))
    assert chart["appVersion"] == __version__


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(TOOLS / "bin/helm"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)


def render(*values: str) -> list[dict[str, Any]]:
    sets = [part for value in values for part in ("--set", value)]
    done = helm("template", "r", str(CHART), "--namespace", NAMESPACE, *sets)
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.safe_load_all(done.stdout) if each]


def pods_of(objects: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for each in objects:
        if each["kind"] in ("Deployment", "Job"):
            yield each["metadata"]["labels"]["app.kubernetes.io/component"], each["spec"]["template"]["spec"]


@pytest.mark.k8s
@pytest.mark.parametrize("name", VALUES)
def test_what_the_chart_makes_is_valid(name: str, tmp_path: Path) -> None:
    sets = [part for value in VALUES[name] for part in ("--set", value)]
    lint = helm("lint", "--strict", str(CHART), *sets)
    assert lint.returncode == 0, lint.stdout
    rendered = tmp_path / "rendered.yaml"
    rendered.write_text(yaml.safe_dump_all(render(*VALUES[name])))
    check = [str(TOOLS / "venv/bin/kubernetes-validate"), "--strict", "--no-warn", str(rendered)]
    done = subprocess.run(check, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.k8s
@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        (["gatway.replicas=2"], "gatway"),
        (["decode.replicas=-1"], "replicas"),
        (["openai.enabled=true"], "needs gateway.keysSecret"),
        (["redis.enabled=false"], "redis.urlOfGateways"),
        (["gateway.env.kvrelay_port=1"], "kvrelay_port"),
    ],
)
def test_wrong_values_are_refused_by_name(values: list[str], complaint: str) -> None:
    sets = [part for value in values for part in ("--set", value)]
    done = helm("template", "r", str(CHART), *sets)
    assert done.returncode != 0
    assert complaint in done.stderr


@pytest.mark.k8s
@pytest.mark.parametrize("name", VALUES)
def test_pods_have_no_rights_that_they_need_not(name: str) -> None:
    known = {f"KVRELAY_{field.upper()}" for section in SECTIONS.values() for field in setting_fields(section)}
    for component, pod in pods_of(render(*VALUES[name])):
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        mounted = {volume["name"] for volume in pod["volumes"]}
        for container in [*pod.get("initContainers", ()), *pod["containers"]]:
            rights = container["securityContext"]
            assert (rights["allowPrivilegeEscalation"], rights["readOnlyRootFilesystem"]) == (False, True)
            assert rights["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]
            assert {mount["name"] for mount in container["volumeMounts"]} <= mounted
            variables = {each["name"] for each in container.get("env", ()) if each["name"].startswith("KVRELAY_")}
            assert variables <= known, component
        secrets = {source["secret"]["name"] for volume in pod["volumes"] for source in sources_of(volume)}
        assert f"{PREFIX}-authority" not in secrets
        own = {"openai": "front"}.get(component, component)
        assert all(secret.startswith((f"{PREFIX}-{own}", "passwords")) for secret in secrets), (component, secrets)


def sources_of(volume: dict[str, Any]) -> list[dict[str, Any]]:
    return [source for source in volume.get("projected", {}).get("sources", ()) if "secret" in source]


@pytest.mark.k8s
def test_only_gateways_and_prefill_workers_reach_workers() -> None:
    policies = {
        each["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"]: each["spec"]
        for each in render(*VALUES["everything"])
        if each["kind"] == "NetworkPolicy"
    }
    assert policies.keys() == {"gateway", "prefill", "decode", "openai", "redis"}

    def callers(component: str, port: str) -> set[str]:
        rules = [rule for rule in policies[component]["ingress"] if {"port": port} in rule["ports"]]
        peers = [peer["podSelector"].get("matchLabels", {}) for rule in rules for peer in rule["from"]]
        return {labels.get("app.kubernetes.io/component", "anybody") for labels in peers}

    assert callers("prefill", "grpc") == {"gateway"}
    assert callers("decode", "grpc") == {"gateway", "prefill"}
    assert callers("redis", "redis") == {"gateway", "prefill", "decode"}
    assert callers("gateway", "peers") == {"gateway", "openai"}
    assert policies["redis"]["egress"] == []


class Pods(ContainerProcesses):
    """Containers of the rendered chart, with the files of their Secrets."""

    def __init__(self, objects: list[dict[str, Any]], store: Store, model: Path, folder: Path) -> None:
        super().__init__()
        self._pods = dict(pods_of(objects))
        self._model = model
        self._folder = folder
        for name, pod in self._pods.items():
            (folder / name).mkdir()
            for volume in pod["volumes"]:
                for source in sources_of(volume):
                    files = store.files(source["secret"]["name"])
                    for item in source["secret"]["items"]:
                        (folder / name / item["path"]).write_bytes(files[item["key"]])

    def arguments(self, name: str) -> Sequence[str]:
        (container,) = self._pods[name]["containers"]
        return [str(each) for each in container["args"]]

    def variables(self, name: str) -> dict[str, str]:
        (container,) = self._pods[name]["containers"]
        given = [each for each in container.get("env", ()) if "value" in each]
        return {each["name"]: self.with_own_port(name, each["value"]) for each in given}

    def here(self, name: str, text: str) -> str:
        text = text.replace("/secrets/own", str(self._folder / name)).replace("smollm2-135m-instruct", str(self._model))
        return text.replace(f"{PREFIX}-redis.{NAMESPACE}.svc:6379", f"127.0.0.1:{self.redis_port}")


@pytest.mark.k8s
async def test_the_charts_processes_serve_a_client_that_proves_who_it_is(tmp_path: Path) -> None:
    if shutil.which("redis-server") is None:
        pytest.skip(left_out.REDIS_SERVER)
    store = Store()
    await asyncio.to_thread(publish, store, f"{PREFIX}-gateway.{NAMESPACE}.svc")
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    model = make_tiny_model("llama", tmp_path / "model")
    pods = Pods(await asyncio.to_thread(render), store, model, secrets)
    for file, content in store.files(f"{PREFIX}-operator").items():
        (tmp_path / file).write_bytes(content)
    tls = TLS(
        ca=str(tmp_path / "ca.pem"), cert=str(tmp_path / "certificate.pem"), key=str(tmp_path / "certificate.key")
    )
    names = ("gateway", "prefill", "decode")
    async with AsyncExitStack() as running:
        for name in ("redis", *names):
            await running.enter_async_context(pods.running(name))
        try:
            await wait_until(lambda: all(pods.ready(name) for name in names), "all serve", TIMEOUT_S)
        except AssertionError:
            raise AssertionError(pods.output()) from None
        ready = pods.ready("gateway")
        assert ready is not None
        port = ready["address"].rpartition(":")[2]
        async with AsyncClient(f"127.0.0.1:{port}", tls=tls, timeout_s=TIMEOUT_S) as client:

            async def all_connected() -> bool:
                return [worker.connected for worker in (await client.cluster()).workers] == [True, True]

            await wait_until(all_connected, "the gateway has sessions with both workers", TIMEOUT_S)
            completion = await client.complete(token_ids=list(range(20, 60)), max_tokens=4, ignore_eos=True)
        assert len(completion.outputs[0].tokens) == 4
        assert completion.finished.phases.transfer_bytes > 0
