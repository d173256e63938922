"""The documents say what the code does: settings, commands and RPCs are all described, and links
lead somewhere.
"""

import ast
import asyncio
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import typer.main

from benchmarks.registry import BENCHMARKS
from decode_worker import metrics as decode_metrics
from gateway.telemetry import metrics as gateway_metrics
from kvrelay.cli.app import app
from kvrelay.config.base import Settings
from kvrelay.config.connection_settings import ConnectionSettings
from kvrelay.config.decoding_settings import DecodingSettings
from kvrelay.config.quota_settings import QuotaSettings
from kvrelay.config.security_settings import PeerSettings, SecuritySettings
from kvrelay.config.settings import (
    ClientSettings,
    ClusterSettings,
    EngineSettings,
    OpenAISettings,
    RequestSettings,
    ServerSettings,
    TransferSettings,
)
from kvrelay.core.request_state import EDGES, RequestState
from kvrelay.v1 import inference_pb2
from kvrelay.worker import metrics
from prefill_worker import metrics as prefill_metrics
from tests.network.test_rpc import wire_errors
from tests.support.fake_inference_service import FakeInferenceService, accepted, delta, finished, play, start_fake
from tools import generate_reference

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
OPERATING = (ROOT / "docs/guides/operate.md").read_text("utf-8")
MEASURING = (ROOT / "docs/guides/measure.md").read_text("utf-8")
PROTOCOL = (ROOT / "docs/reference/protocol.md").read_text("utf-8")
SETTINGS = (ROOT / "docs/reference/settings.md").read_text("utf-8")
METRICS = (ROOT / "docs/reference/metrics.md").read_text("utf-8")
COMMANDS = (ROOT / "docs/reference/cli.md").read_text("utf-8")
ARCHITECTURE = ROOT / "docs/architecture"
ERRORS = (ROOT / "docs/reference/errors.md").read_text("utf-8")


SOURCE_FOLDERS = (
    "kvrelay",
    "gateway",
    "prefill_worker",
    "decode_worker",
    "protos",
    "benchmarks",
    "tools",
    "deploy",
    "examples",
)
SOURCE_SUFFIXES = {".py", ".html", ".js", ".md", ".sh", ".yml", ".yaml", ".proto", ".service"}


def source_files() -> list[Path]:
    """What people read of the repository, without tests."""
    files = [path for folder in SOURCE_FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SOURCE_SUFFIXES]
    return sorted(
        {*files, *PAGES, *(ROOT / name for name in ("Dockerfile", "docker-compose.yml", "pyproject.toml", "Makefile"))}
    )


def setting_row(name: str, default: object, description: str | None) -> str:
    shown = {None: "", True: "on", False: "off"}.get(default, default) if isinstance(default, bool | None) else default
    return f"| `--{name.replace('_', '-')}` | {shown} | {description} |"


SETTINGS_CLASSES: tuple[type[Settings], ...] = (
    QuotaSettings,
    ConnectionSettings,
    DecodingSettings,
    SecuritySettings,
    PeerSettings,
    ServerSettings,
    EngineSettings,
    TransferSettings,
    RequestSettings,
    ClusterSettings,
    ClientSettings,
    OpenAISettings,
)


@pytest.mark.parametrize("settings_class", SETTINGS_CLASSES)
def test_every_setting_stands_in_the_reference(settings_class: type[Settings]) -> None:
    rows = [
        setting_row(name, field.default, field.description)
        for name, field in settings_class.model_fields.items()
        if not isinstance(field.default, Settings)  # it has a class, and so rows, of its own
    ]
    assert [row for row in rows if row not in SETTINGS] == []


def test_every_command_is_mentioned() -> None:
    text = "\n".join(page.read_text("utf-8") for page in PAGES)
    group = typer.main.get_command(app)
    names = list(group.commands)  # type: ignore[attr-defined]
    assert len(names) > 8
    assert [name for name in names if f"kvrelay {name}" not in text] == []


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_has_its_part_in_the_measuring_page_and_its_options_in_the_reference(name: str) -> None:
    assert f"\n## kvrelay bench {name}\n" in MEASURING
    assert f"cli.md#kvrelay-bench-{name})" in MEASURING
    section = COMMANDS.partition(f"## kvrelay bench {name}\n")[2].partition("\n## ")[0]
    command = typer.Typer(add_completion=False)
    command.command()(importlib.import_module(BENCHMARKS[name].module).command)
    parameters = typer.main.get_command(command).params
    settings = {f"--{field.replace('_', '-')}" for kind in SETTINGS_CLASSES for field in kind.model_fields}
    options = {parameter.opts[0] for parameter in parameters} - {"--config"}
    assert {option for option in options if f"| `{option}" not in section and option not in settings} == set()


def test_generated_pages_are_what_the_code_declares() -> None:
    assert generate_reference.stale_pages() == [], "run `make reference` (python -m tools.generate_reference)"


@pytest.mark.parametrize(
    "module", [gateway_metrics, metrics, prefill_metrics, decode_metrics], ids=lambda module: module.__name__
)
def test_every_family_of_metrics_stands_in_the_reference(module: ModuleType) -> None:
    rows = [f"| `{each.name}` | {each.kind} | {', '.join(each.labels)} | {each.help} |" for each in module.FAMILIES]
    assert [row for row in rows if row not in METRICS] == []


def test_variables_of_compose_stand_in_the_operating_page() -> None:
    variables = set(re.findall(r"\$\{([A-Z_]+):-", (ROOT / "docker-compose.yml").read_text("utf-8")))
    assert len(variables) > 8
    assert [name for name in sorted(variables) if f"`{name}`" not in OPERATING] == []


def test_every_rpc_of_clients_is_described() -> None:
    methods = [method.name for method in inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].methods]
    assert len(methods) == 11
    assert [name for name in methods if name not in PROTOCOL] == []


def test_every_reason_that_clients_can_get_is_described() -> None:
    assert [kind.reason for kind in wire_errors() if f"`{kind.reason}`" not in ERRORS] == []


def anchors_of(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!http)([^)#\s]*)#?([^)\s]*)\)", page.read_text("utf-8"))
    assert [target for target, _ in links if not (page.parent / target).exists()] == []
    anchored = [((page.parent / target) if target else page, anchor) for target, anchor in links if anchor]
    assert [f"{page.name}#{anchor}" for page, anchor in anchored if anchor not in anchors_of(page)] == []


def test_every_page_of_the_site_is_in_its_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:")[2]
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")]
    assert len(pages) > 8
    assert [page for page in pages if f"- {page}\n" not in menu] == []


def value_of(path: str, name: str) -> float:
    """Of a constant, or of a setting's default where the name is Class.setting."""
    found: object = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    for part in name.split("."):
        found = (
            found.model_fields[part].default
            if isinstance(found, type) and issubclass(found, Settings)
            else getattr(found, part)
        )
    assert isinstance(found, int | float)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_constants_that_a_page_states_are_those_of_the_code(page: Path) -> None:
    """A number that comes from the code is followed by <!-- path NAME --> or <!-- path NAME /
    divisor -->.
    """
    marks = re.findall(r"(\S*)<!-- (\S+\.py) ([\w.]+)(?: / ([\d_]+))? -->", page.read_text("utf-8"))
    shown = [(text, name, f"{value_of(path, name) / int(divisor or 1):,.10g}") for text, path, name, divisor in marks]
    assert [each for each in shown if each[0].lstrip("(`") != each[2]] == []


def test_paths_of_documents_in_the_sources_are_right() -> None:
    """Error messages, docstrings and comments name pages by their path from the root."""
    named = {name for file in source_files() for name in re.findall(r"\bdocs/[\w/.-]+?\.md\b", file.read_text("utf-8"))}
    assert len(named) > 5
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_no_install_line_asks_an_index_for_kvrelay() -> None:
    """It is on none that everybody has: lines name a checkout."""
    asking = re.compile(r"""pip3? install\b[^\n`#]*?\s['"]?kvrelay(\[|['"\s`=<>]|$)""", re.MULTILINE)
    assert asking.search("run pip install -U 'kvrelay[worker]'")
    assert asking.search("`pip install kvrelay`")
    assert not asking.search("pip install './kvrelay[worker]'")
    found = {path.relative_to(ROOT).as_posix() for path in source_files() if asking.search(path.read_text("utf-8"))}
    assert found == set()


def defined_in(path: Path) -> set[str]:
    """What a module defines: functions, classes and constants, and the members of its classes as
    Class.member.
    """

    def names(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from names(node.body, f"{node.name}.")
            targets = (
                node.targets
                if isinstance(node, ast.Assign)
                else [node.target]
                if isinstance(node, ast.AnnAssign)
                else []
            )
            yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))

    return set(names(ast.parse(path.read_text("utf-8")).body))


def test_every_question_is_answered_by_a_place_that_exists() -> None:
    rows = re.findall(r"^\| (.+\?) \| (.+) \|$", (ARCHITECTURE / "questions.md").read_text("utf-8"), re.MULTILINE)
    places = {question: re.fullmatch(r"`(\S+\.py)` · `(\S+)`", place) for question, place in rows}
    assert len(places) > 20
    assert [question for question, place in places.items() if place is None] == []
    assert [place[0] for place in places.values() if place and place[2] not in defined_in(ROOT / place[1])] == []


@pytest.mark.parametrize("page", [*ARCHITECTURE.glob("*.md"), *ROOT.glob("docs/adr/*.md")], ids=lambda page: page.name)
def test_paths_that_a_page_of_the_architecture_names_exist(page: Path) -> None:
    folders = "|".join(
        ("gateway", "prefill_worker", "decode_worker", "kvrelay", "benchmarks", "protos", "tests", "tools", "deploy")
    )
    named = re.findall(rf"`((?:{folders})/[\w/.-]+)`", page.read_text("utf-8"))
    in_a_wheel = {"kvrelay/_services", "kvrelay/protos"}
    assert [name for name in named if name not in in_a_wheel and not (ROOT / name).exists()] == []


def test_the_first_page_of_the_architecture_stays_short_and_draws_the_states_that_there_are() -> None:
    text = (ARCHITECTURE / "index.md").read_text("utf-8")
    assert len(text.splitlines()) <= 150
    drawn = set(re.findall(r"^    ([A-Z]+) --> ([A-Z]+):", text, re.MULTILINE))
    early_ends = {RequestState.FAILED, RequestState.CANCELLED, RequestState.EXPIRED}
    assert drawn == {(begin.value, end.value) for begin, end in EDGES if end not in early_ends}


# What the project calls by a word of its own, or by a word of the field in a narrower meaning.
OWN_WORDS = (
    *(
        "admission",
        "attempt",
        "block table",
        "borrow, lend",
        "breaker",
        "chunk",
        "coalesce",
        "cooldown",
        "drain",
        "exposed transfer",
    ),
    *(
        "fault point",
        "fingerprint",
        "frame",
        "grace period",
        "handoff",
        "handoff gap",
        "inbox",
        "isolation",
        "job",
        "journal",
    ),
    *(
        "lease",
        "lifecycle",
        "liveness window",
        "log",
        "mask",
        "orphan",
        "owner",
        "pair",
        "phase",
        "poison request",
        "preempt",
    ),
    *(
        "probe",
        "push",
        "reader",
        "region",
        "reservation",
        "resumable",
        "retry budget",
        "sequence",
        "session",
        "slot",
        "span",
    ),
    *(
        "step",
        "sweep",
        "takeover",
        "terminal",
        "throttle",
        "ticket",
        "timeline",
        "transition",
        "watchdog",
        "write grant",
        "zombie",
    ),
)
# Words that have been replaced: docs/adr/0012-names.md says by which.
BANNED_WORDS = frozenset(
    (
        "knock",
        "knocking",
        "guest",
        "inquest",
        "inquests",
        "guilty",
        "doubt",
        "portion",
        "turnstile",
        "permit",
        "permits",
        "letter",
    )
)


def test_the_glossary_has_the_projects_own_words_in_order() -> None:
    entries = re.findall(
        r"^\| ([a-z][^|]*|[A-Z]+) \| (.+) \|$", (ARCHITECTURE / "glossary.md").read_text("utf-8"), re.MULTILINE
    )
    words = [word for word, _ in entries if word != "word"]
    assert [word for word in OWN_WORDS if word not in words] == []
    assert words == sorted(set(words), key=str.lower)


def test_no_name_in_the_product_has_a_word_that_was_replaced() -> None:
    found = set()
    for package in ("gateway", "prefill_worker", "decode_worker", "kvrelay"):
        for path in (ROOT / package).rglob("*.py"):
            names = {path.stem, *(name.rpartition(".")[2] for name in defined_in(path))}
            words = {word.lower() for name in names for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}
            found |= {f"{path.relative_to(ROOT)}: {word}" for word in words & BANNED_WORDS}
    assert found == set()


async def test_the_readmes_example_runs_as_it_stands() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    service = FakeInferenceService()
    service.generate = [play(accepted(), delta(0, "Air scatters"), delta(1, " blue light.", last=True), finished())]
    bound, address = await start_fake(service)
    command = [sys.executable, "-c", example.replace("127.0.0.1:50050", address)]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    async with asyncio.timeout(90):
        output, _ = await process.communicate()
    await bound.server.stop(None)
    assert process.returncode == 0
    assert output.decode().startswith("Air scatters blue light.\n")
    assert "prefill_ms" in output.decode()
