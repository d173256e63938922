"""The documents say what the code does: settings, commands and RPCs are all described, and links lead somewhere."""

import asyncio
import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import typer.main

from benchmarks.registry import BENCHMARKS
from decode_worker import metrics as decode_metrics
from gateway import metrics as gateway_metrics
from kvrelay.cli.app import app
from kvrelay.config import (
    ClientSettings,
    ClusterSettings,
    DecodingSettings,
    EngineSettings,
    RelaySettings,
    ServerSettings,
    Settings,
    TransferSettings,
)
from kvrelay.metrics import worker_metrics
from kvrelay.v1 import inference_pb2
from prefill_worker import metrics as prefill_metrics
from tests.fake_inference_service import FakeInferenceService, accepted, delta, finished, play, start_fake
from tests.test_rpc import wire_errors

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
OPERATING = (ROOT / "docs/operating.md").read_text("utf-8")
WATCHING = (ROOT / "docs/watching.md").read_text("utf-8")
MEASURING = (ROOT / "docs/measuring.md").read_text("utf-8")
PROTOCOL = (ROOT / "docs/protocol.md").read_text("utf-8")


def setting_row(name: str, default: object, description: str | None) -> str:
    shown = {None: "", True: "on", False: "off"}.get(default, default) if isinstance(default, bool | None) else default
    return f"| `--{name.replace('_', '-')}` | {shown} | {description} |"


@pytest.mark.parametrize(
    "settings_class",
    [ServerSettings, EngineSettings, DecodingSettings, TransferSettings, RelaySettings, ClusterSettings, ClientSettings],
)
def test_every_setting_stands_in_the_operating_page(settings_class: type[Settings]) -> None:
    rows = [setting_row(name, field.default, field.description) for name, field in settings_class.model_fields.items()]
    assert [row for row in rows if row not in OPERATING] == []


def test_every_command_is_mentioned() -> None:
    text = "\n".join(page.read_text("utf-8") for page in PAGES)
    group = typer.main.get_command(app)
    names = list(group.commands)  # type: ignore[attr-defined]
    assert len(names) > 8
    assert [name for name in names if f"kvrelay {name}" not in text] == []


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_option_of_a_benchmark_stands_in_the_measuring_page(name: str) -> None:
    _, _, rest = MEASURING.partition(f"## kvrelay bench {name}\n")
    section, _, _ = rest.partition("\n## ")
    command = typer.Typer()
    command.command()(importlib.import_module(BENCHMARKS[name].module).command)
    parameters = typer.main.get_command(command).params
    options = {parameter.opts[0] for parameter in parameters} - {"--config", "--install-completion", "--show-completion"}
    documented = section + OPERATING + MEASURING.partition("\n## ")[0]
    assert section
    assert {option for option in options if f"| `{option}" not in documented} == set()


@pytest.mark.parametrize(
    "module", [gateway_metrics, worker_metrics, prefill_metrics, decode_metrics], ids=lambda module: module.__name__
)
def test_every_family_of_metrics_stands_in_the_watching_page(module: ModuleType) -> None:
    rows = [f"| `{each.name}` | {each.kind} | {', '.join(each.labels)} | {each.help} |" for each in module.FAMILIES]
    assert [row for row in rows if row not in WATCHING] == []


def test_variables_of_compose_stand_in_the_operating_page() -> None:
    variables = set(re.findall(r"\$\{([A-Z_]+):-", (ROOT / "docker-compose.yml").read_text("utf-8")))
    assert len(variables) > 8
    assert [name for name in sorted(variables) if f"`{name}`" not in OPERATING] == []


def test_every_rpc_of_clients_is_described() -> None:
    methods = [method.name for method in inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].methods]
    assert len(methods) == 11
    assert [name for name in methods if name not in PROTOCOL] == []


def test_every_reason_that_clients_can_get_is_described() -> None:
    assert [kind.reason for kind in wire_errors() if kind.reason not in PROTOCOL] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!http)([^)#]+)", page.read_text("utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


async def test_the_readmes_example_runs_as_it_stands() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    service = FakeInferenceService()
    service.generate = [play(accepted(), delta(0, "Air scatters"), delta(1, " blue light.", last=True), finished())]
    bound, address = await start_fake(service)
    command = [sys.executable, "-c", example.replace("127.0.0.1:50050", address)]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    async with asyncio.timeout(30):
        output, _ = await process.communicate()
    await bound.server.stop(None)
    assert process.returncode == 0
    assert output.decode().startswith("Air scatters blue light.\n")
    assert "prefill_ms" in output.decode()
