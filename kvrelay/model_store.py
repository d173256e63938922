"""The folder in which models lie by name, each as transformers writes it (config.json, safetensors, tokenizer.json).

    <root>/smollm2-135m-instruct/     a model
    <root>/my-model -> /data/model    a link to one
    <root>/.incoming-NAME-*/          a model that is being made; becomes NAME by one rename, or is swept by the next attempt
    <root>/.NAME.lock                 held by the process that makes it

Knows nothing about weights: `model_sources` says where models come from, the engine loads them.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from kvrelay.cache_folder import cache_folder
from kvrelay.errors import ModelLoadError
from kvrelay.model_sources import Progress, convert_gguf, fetch_demo_gguf, fetch_from_hub

DEMO_MODEL = "smollm2-135m-instruct"
LOCK_TIMEOUT_S = 1800
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

# What share of making the demo model is getting the file; the rest is its conversion.
FETCH_SHARE = 0.2


def default_model_dir(environment: Mapping[str, str]) -> Path:
    """The store's folder where nothing else was said: $KVRELAY_MODEL_DIR, or kvrelay/models in the user's cache folder."""
    if directory := environment.get("KVRELAY_MODEL_DIR"):
        return Path(directory).expanduser()
    return cache_folder(environment) / "models"


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model in the store. `architecture` is transformers' model type; `dtype` is what the weights are kept in."""

    name: str
    path: Path
    size_bytes: int
    architecture: str
    dtype: str


def _ignore_progress(stage: str, fraction: float) -> None:
    pass


@dataclass(frozen=True, slots=True)
class ModelStore:
    """Models by name under `root`. Several processes may use one store; what one of them makes is never seen half made."""

    root: Path
    convert: Callable[[Path, Path, str, Progress], None] = convert_gguf
    fetch_demo: Callable[[Path, Progress], Path] = fetch_demo_gguf
    fetch_hub: Callable[[str], Path] = fetch_from_hub

    def list_models(self) -> list[StoredModel]:
        """All models in the store, by name. Folders that hold no readable model are left out."""
        if not self.root.is_dir():
            return []
        found = (_describe(path) for path in sorted(self.root.iterdir()) if not path.name.startswith("."))
        return [model for model in found if model is not None]

    def resolve(self, name_or_path: str, progress: Progress = _ignore_progress) -> Path:
        """The folder of a model: a name in the store, a folder, a GGUF file (converted once), or a hub's name.

        Raises:
            ModelLoadError: it is none of them; the message says what to do.
        """
        if MODEL_NAME.fullmatch(name_or_path) and (self.root / name_or_path).is_dir():
            return check_model_folder(self.root / name_or_path)
        path = Path(name_or_path).expanduser()
        if path.is_dir():
            return check_model_folder(path)
        if path.suffix == ".gguf" and path.is_file():
            return self._resolve_gguf(path, progress)
        try:
            return check_model_folder(self.fetch_hub(name_or_path))
        except ModelLoadError as error:
            raise ModelLoadError(
                f"no model {name_or_path!r} in {self.root}, no such folder or GGUF file, and {error.message}."
                " `kvrelay models` shows what there is; `kvrelay models add NAME PATH` adds a folder or a GGUF file"
            ) from error

    def add_model(
        self, name: str, source: Path, *, dtype: str = "float32", link: bool = False, progress: Progress = _ignore_progress
    ) -> Path:
        """Puts the model in `source`, a folder or a GGUF file, under `name`. Folders are copied, or linked when `link` is set.

        Args:
            name: letters, digits, dot, dash and underscore; at most 128.
            source: where it lies; stays as it is.
            dtype: what a GGUF file's weights are converted to.
            link: keep a symbolic link to the folder instead of a copy.
            progress: told about a conversion.

        Raises:
            ModelLoadError: the name is taken or no name, or the source is no model.
        """
        if not MODEL_NAME.fullmatch(name):
            raise ModelLoadError(f"{name!r} is no name for a model: letters, digits, '.', '-' and '_', at most 128, no '.' first")
        source = source.expanduser().resolve()
        is_gguf = source.suffix == ".gguf" and source.is_file()
        if not is_gguf:
            check_model_folder(source)
        with self._lock(name, progress):
            target = self.root / name
            if target.is_symlink() or target.exists():
                raise ModelLoadError(f"there is a model {name!r} already; `kvrelay models remove {name}` removes it")
            if is_gguf:
                return self._install(name, lambda staging: self.convert(source, staging, dtype, progress))
            if link:
                target.symlink_to(source)
                return target
            return self._install(name, lambda staging: _copy_folder(source, staging))

    def remove_model(self, name: str) -> None:
        """Deletes a model, or the link to one.

        Raises:
            ModelLoadError: the store has no such model.
        """
        target = self.root / name
        if not MODEL_NAME.fullmatch(name) or not (target.is_symlink() or target.is_dir()):
            raise ModelLoadError(f"no model {name!r} in {self.root}; `kvrelay models` shows what there is")
        with self._lock(name, _ignore_progress):
            if target.is_symlink():
                target.unlink()
                return
            # Out of the way first: nobody may find the half of it that is not deleted yet.
            leaving = Path(tempfile.mkdtemp(prefix=f".incoming-{name}-", dir=self.root))
            target.replace(leaving / name)
            shutil.rmtree(leaving)

    def ensure_demo_model(self, progress: Progress = _ignore_progress) -> Path:
        """Folder of SmolLM2-135M-Instruct in float32, made on first use in about a minute.

        Raises:
            ModelLoadError: it could not be fetched or converted.
        """
        target = self.root / DEMO_MODEL
        if target.is_dir():
            return check_model_folder(target)

        def make(staging: Path) -> None:
            with tempfile.TemporaryDirectory() as download:
                gguf = self.fetch_demo(Path(download), _part(progress, 0.0, FETCH_SHARE))
                self.convert(gguf, staging, "float32", _part(progress, FETCH_SHARE, 1.0))

        return self._make_once(DEMO_MODEL, make, progress)

    def _resolve_gguf(self, path: Path, progress: Progress) -> Path:
        """The folder that a GGUF file was or now is converted to; its name follows the file's name, size and time of change."""
        status = path.stat()
        identity = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
        stem = re.sub(r"[^a-z0-9._-]+", "-", path.stem.lower()).strip(".-_") or "gguf"
        name = f"{stem[:100]}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
        return self._make_once(name, lambda staging: self.convert(path, staging, "float32", progress), progress)

    def _make_once(self, name: str, make: Callable[[Path], None], progress: Progress) -> Path:
        with self._lock(name, progress):
            if (self.root / name).is_dir():
                return check_model_folder(self.root / name)
            return self._install(name, make)

    def _install(self, name: str, make: Callable[[Path], None]) -> Path:
        """Lets `make` fill a new folder and gives it its name when it holds a model. The caller holds the name's lock."""
        for leftover in self.root.glob(f".incoming-{name}-*"):
            shutil.rmtree(leftover)
        staging = Path(tempfile.mkdtemp(prefix=f".incoming-{name}-", dir=self.root))
        try:
            make(staging)
            check_model_folder(staging)
            _open_to_all_readers(staging)
            staging.replace(self.root / name)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        return self.root / name

    @contextmanager
    def _lock(self, name: str, progress: Progress) -> Iterator[None]:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.root / f".{name}.lock")
            try:
                lock.acquire(blocking=False)
            except Timeout:
                progress("waiting for another process that makes this model", 0.0)
                lock.acquire(timeout=LOCK_TIMEOUT_S)
        except Timeout as error:
            raise ModelLoadError(
                f"another process has been making {name!r} for {LOCK_TIMEOUT_S} s; end it and try again"
            ) from error
        except OSError as error:
            raise ModelLoadError(
                f"the model folder {self.root} cannot be used: {error.strerror}; set KVRELAY_MODEL_DIR"
            ) from error
        try:
            yield
        finally:
            lock.release()


def check_model_folder(path: Path) -> Path:
    """`path`, when it holds a model as far as its files' names and its config show.

    Raises:
        ModelLoadError: what is missing.
    """
    if not path.is_dir():
        raise ModelLoadError(f"{path} is neither a model folder nor a GGUF file")
    config_path = path / "config.json"
    try:
        config = json.loads(config_path.read_bytes())
    except FileNotFoundError as error:
        raise ModelLoadError(f"{path} is no model folder: it has no config.json") from error
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{config_path} cannot be read: {error}") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ModelLoadError(f"{config_path} names no model_type")
    if not any(path.glob("*.safetensors")):
        raise ModelLoadError(f"{path} has no *.safetensors file; other formats of weights are not read")
    return path


def _describe(path: Path) -> StoredModel | None:
    try:
        check_model_folder(path)
    except ModelLoadError:
        return None
    config = json.loads((path / "config.json").read_bytes())
    size_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    return StoredModel(path.name, path, size_bytes, config["model_type"], dtype)


def _part(progress: Progress, begin: float, end: float) -> Progress:
    """A progress whose 0 to 1 is `begin` to `end` of the given one."""
    return lambda stage, fraction: progress(stage, begin + (end - begin) * fraction)


def _copy_folder(source: Path, target: Path) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))


def _open_to_all_readers(folder: Path) -> None:
    """Temporary folders and safetensors are private when made; models are not, whoever the worker runs as."""
    folder.chmod(0o755)
    for path in folder.rglob("*"):
        os.chmod(path, 0o755 if path.is_dir() else 0o644)
