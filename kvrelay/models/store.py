"""The folder that keeps models by name, each as transformers writes it.

<root>/smollm2-135m-instruct/     a model
<root>/my-model -> /data/model    a link to one
<root>/.incoming-NAME-*/          a model being made; renamed to NAME, or swept by the next try
<root>/.NAME.lock                 held by the process that makes it
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

from kvrelay.core.sampling_params import SamplingDefaults
from kvrelay.errors import ModelLoadError
from kvrelay.models.generation_config import read_sampling_defaults, recommend_sampling
from kvrelay.models.sources import (
    HUB_NAME,
    Progress,
    check_conversion,
    check_demo_download,
    check_gguf,
    convert_gguf,
    fetch_demo_gguf,
    fetch_from_hub,
)
from kvrelay.runtime.cache_folder import cache_folder

DEMO_MODEL = "smollm2-135m-instruct"
DEMO_SAMPLING = SamplingDefaults(temperature=0.2, top_p=0.5)
"""The card says 0.2 and 0.9. With weights of few bits, three in five answers to "Hello" would then
begin with a non-word.
"""
LOCK_TIMEOUT_S = 1800
_NOT_MADE_YET = "it was not made yet"
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

# The rest of the time to make the demo model is its conversion.
FETCH_SHARE = 0.2


def default_model_dir(environment: Mapping[str, str]) -> Path:
    if directory := environment.get("KVRELAY_MODEL_DIR"):
        return Path(os.path.expanduser(directory))
    return cache_folder(environment) / "models"


@dataclass(frozen=True, slots=True)
class StoredModel:
    name: str
    path: Path
    size_bytes: int
    architecture: str
    dtype: str
    sampling_defaults: SamplingDefaults


def _ignore_progress(stage: str, fraction: float) -> None:
    pass


@dataclass(frozen=True, slots=True)
class ModelStore:
    """Processes can share a store; none sees a half-made model."""

    root: Path
    convert: Callable[[Path, Path, str, Progress], None] = convert_gguf
    fetch_demo: Callable[[Path, Progress], Path] = fetch_demo_gguf
    fetch_hub: Callable[[str], Path] = fetch_from_hub
    check_conversion: Callable[[], None] = check_conversion
    """Called before any download."""

    def list_models(self) -> list[StoredModel]:
        if not os.access(self.root, os.R_OK | os.X_OK):
            return []
        found = (_describe(path) for path in sorted(self.root.iterdir()) if not path.name.startswith("."))
        return [model for model in found if model is not None]

    def check(self, name_or_path: str, *, makes_demo: bool = True) -> None:
        """Finds out, without a network, why `ensure` (or `resolve`, without `makes_demo`) would
        fail.

        Raises:
            ModelLoadError: says what to do.
        """
        path = Path(os.path.expanduser(name_or_path))
        if MODEL_NAME.fullmatch(name_or_path) and (self.root / name_or_path).is_dir():
            check_model_folder(self.root / name_or_path)
        elif name_or_path == DEMO_MODEL and not makes_demo:
            raise self._not_found(name_or_path, _NOT_MADE_YET)
        elif name_or_path == DEMO_MODEL:
            self.check_conversion()
            check_demo_download()
        elif path.is_dir():
            check_model_folder(path)
        elif path.suffix == ".gguf" and path.is_file():
            check_gguf(path)
            self.check_conversion()
        elif not _may_be_of_a_hub(name_or_path):
            raise self._not_found(name_or_path, "no hub's model is called so")

    def ensure(self, name_or_path: str, progress: Progress = _ignore_progress) -> Path:
        """As `resolve`, but makes the demo model on first use."""
        if name_or_path == DEMO_MODEL:
            return self.ensure_demo_model(progress)
        return self.resolve(name_or_path, progress)

    def resolve(self, name_or_path: str, progress: Progress = _ignore_progress) -> Path:
        """Finds a name in the store, a folder, a GGUF file or a hub's name.

        Raises:
            ModelLoadError: it is none of them; says what to do.
        """
        if MODEL_NAME.fullmatch(name_or_path) and os.path.isdir(self.root / name_or_path):
            return check_model_folder(self.root / name_or_path)
        path = Path(os.path.expanduser(name_or_path))
        if os.path.isdir(path):
            return check_model_folder(path)
        if path.suffix == ".gguf" and os.path.isfile(path):
            return self._resolve_gguf(path, progress)
        if name_or_path == DEMO_MODEL:
            raise self._not_found(name_or_path, _NOT_MADE_YET)
        if not _may_be_of_a_hub(name_or_path):
            raise self._not_found(name_or_path, "no hub's model is called so")
        try:
            return check_model_folder(self.fetch_hub(name_or_path))
        except ModelLoadError as error:
            raise self._not_found(name_or_path, error.message) from error

    def _not_found(self, name_or_path: str, why: str) -> ModelLoadError:
        what_to_do = "`kvrelay models` shows what there is; `kvrelay models add NAME PATH` adds a folder or a GGUF file"
        if name_or_path == DEMO_MODEL:
            what_to_do = f"`kvrelay models add {DEMO_MODEL}` brings it"
        return ModelLoadError(
            f"no model {name_or_path!r} in {self.root}, no such folder or GGUF file, and {why}. {what_to_do}"
        )

    def add_model(
        self,
        name: str,
        source: Path,
        *,
        dtype: str = "float32",
        link: bool = False,
        progress: Progress = _ignore_progress,
    ) -> Path:
        """Stores the model in `source`, a folder or a GGUF file, which is converted to `dtype`.

        Raises:
            ModelLoadError: the name is taken or no name, or the source is no model.
        """
        if not MODEL_NAME.fullmatch(name):
            raise ModelLoadError(
                f"{name!r} is no name for a model: letters, digits, '.', '-' and '_', at most 128, no '.' first"
            )
        source = Path(os.path.expanduser(source)).resolve()
        is_gguf = source.suffix == ".gguf" and os.path.isfile(source)
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
        target = self.root / name
        if not MODEL_NAME.fullmatch(name) or not (target.is_symlink() or target.is_dir()):
            raise ModelLoadError(f"no model {name!r} in {self.root}; `kvrelay models` shows what there is")
        with self._lock(name, _ignore_progress):
            if target.is_symlink():
                target.unlink()
                return
            # Moved away first, so that no process finds a half-deleted model.
            leaving = Path(tempfile.mkdtemp(prefix=f".incoming-{name}-", dir=self.root))
            target.replace(leaving / name)
            shutil.rmtree(leaving)

    def ensure_demo_model(self, progress: Progress = _ignore_progress) -> Path:
        """Makes SmolLM2-135M-Instruct in float32 on first use, in about a minute."""
        target = self.root / DEMO_MODEL
        if os.path.isdir(target):
            check_model_folder(target)
            if not target.is_symlink():
                # An older version made it without these defaults.
                recommend_sampling(target, DEMO_SAMPLING)
            return target

        self.check_conversion()

        def make(staging: Path) -> None:
            # The store has room, and may be the only writable folder.
            with tempfile.TemporaryDirectory(prefix=f".incoming-{DEMO_MODEL}-", dir=self.root) as download:
                gguf = self.fetch_demo(Path(download), _scaled(progress, 0.0, FETCH_SHARE))
                self.convert(gguf, staging, "float32", _scaled(progress, FETCH_SHARE, 1.0))
            recommend_sampling(staging, DEMO_SAMPLING)

        return self._make_once(DEMO_MODEL, make, progress)

    def _resolve_gguf(self, path: Path, progress: Progress) -> Path:
        status = path.stat()
        identity = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
        stem = re.sub(r"[^a-z0-9._-]+", "-", path.stem.lower()).strip(".-_") or "gguf"
        name = f"{stem[:100]}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
        return self._make_once(name, lambda staging: self.convert(path, staging, "float32", progress), progress)

    def _make_once(self, name: str, make: Callable[[Path], None], progress: Progress) -> Path:
        # No lock for a finished model: the store may be read-only.
        if os.path.isdir(self.root / name):
            return check_model_folder(self.root / name)
        with self._lock(name, progress):
            if (self.root / name).is_dir():
                return check_model_folder(self.root / name)
            return self._install(name, make)

    def _install(self, name: str, make: Callable[[Path], None]) -> Path:
        """The caller holds the name's lock."""
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
    """Returns `path`. Raises ModelLoadError that says what is missing."""
    if not os.path.isdir(path):
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
    return StoredModel(path.name, path, size_bytes, config["model_type"], dtype, read_sampling_defaults(path))


def _may_be_of_a_hub(name: str) -> bool:
    return HUB_NAME.fullmatch(name) is not None and not name.startswith(".") and not name.endswith(".gguf")


def _scaled(progress: Progress, begin: float, end: float) -> Progress:
    return lambda stage, fraction: progress(stage, begin + (end - begin) * fraction)


def _copy_folder(source: Path, target: Path) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))


def _open_to_all_readers(folder: Path) -> None:
    """Temporary folders are private, but any user's worker may read models."""
    folder.chmod(0o755)
    for path in folder.rglob("*"):
        os.chmod(path, 0o755 if path.is_dir() else 0o644)
