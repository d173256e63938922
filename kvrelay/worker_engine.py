"""Builds what a worker computes with, from its settings: the model, its pool, and the pool's bookkeeping."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from kvrelay.config import EngineSettings
from kvrelay.core_set import available_cores, format_cores, parse_cores, pin_this_thread
from kvrelay.engine.device import choose_device, choose_dtype, use_threads
from kvrelay.engine.file_pages import give_back_weight_pages
from kvrelay.engine.model_fusion import fuse_model, with_kv_dtype
from kvrelay.engine.model_loader import LoadedModel, load_model
from kvrelay.engine.model_runner import ModelRunner
from kvrelay.engine.native.core_board import CoreBoard
from kvrelay.engine.paged_kv_cache import PagedKVCache
from kvrelay.errors import ConfigError
from kvrelay.kv_cache.block_manager import BlockManager
from kvrelay.kv_cache.memory_planning import blocks_for_budget
from kvrelay.model_spec import KVLayout, ModelSpec
from kvrelay.model_store import DEMO_MODEL, ModelStore, default_model_dir
from kvrelay.step_runner import StepRunner
from kvrelay.worker_grammars import GrammarLoader

BYTES_PER_MIB = 1024 * 1024

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerEngine:
    """The model and its pool. `blocks` and both runners belong to the engine thread."""

    folder: Path
    model: ModelSpec
    cache: PagedKVCache
    blocks: BlockManager
    model_runner: ModelRunner
    step_runner: StepRunner
    grammars: GrammarLoader
    thread_cores: tuple[int, ...] = ()
    """Where the engine thread runs; empty: anywhere."""

    def pin_thread(self) -> None:
        """Called by the engine thread when it starts."""
        if self.thread_cores and not pin_this_thread(self.thread_cores):
            _log.warning("the engine cannot be kept to its cores; it runs anywhere", cores=format_cores(self.thread_cores))

    @property
    def max_sequence_tokens(self) -> int:
        """Most tokens of one sequence that model and pool can hold."""
        return min(self.model.max_context_tokens, self.blocks.num_blocks * self.blocks.block_size)


def build_engine(settings: EngineSettings) -> WorkerEngine:
    """Loads the model and makes its pool.

    Raises:
        ModelLoadError: the model is missing, broken or unsupported.
        ConfigError: the memory for KV holds no block, or cannot be had.
    """
    cores = parse_cores(settings.cores) if settings.cores else ()
    num_threads = settings.num_threads or len(cores) or max(1, (os.cpu_count() or 1) // 2)
    use_threads(num_threads)
    folder = resolve_model(settings)
    device = choose_device(settings.device)
    name = settings.served_model_name or folder.name
    loaded = load_model(folder, name, choose_dtype(settings.dtype, device), device)
    model = with_kv_dtype(_put_on_kernels(loaded, settings), settings.kv_dtype)
    model = _limit_context(model, settings.max_context_tokens)
    if model.kernels is not None:
        num_threads_in_all = model.kernels.use_threads(num_threads, cores, _open_board(settings, cores))
        _log.info("kernels loaded", num_threads=num_threads, num_guests=num_threads_in_all - num_threads)
        if model.decoder is not None:
            # What is left to torch is small, and its threads would spin on the kernels' cores.
            use_threads(1)
            give_back_weight_pages()  # the kernels have copies of nearly all
    layout = model.spec.kv_layout
    num_blocks = settings.num_kv_blocks or blocks_for_budget(layout, settings.block_size, settings.kv_cache_mib * BYTES_PER_MIB)
    cache = _make_pool(layout, num_blocks, settings.block_size, model)
    model_runner = ModelRunner(model, cache)
    _log.info(
        "model loaded",
        model=name,
        num_blocks=num_blocks,
        kv_mib=cache.pool_bytes // BYTES_PER_MIB,
        device=device,
        compiled=model.kernels is not None,
    )
    return WorkerEngine(
        folder=folder,
        model=model.spec,
        cache=cache,
        blocks=BlockManager(num_blocks, settings.block_size, settings.prefix_cache),
        model_runner=model_runner,
        step_runner=StepRunner(model_runner),
        grammars=GrammarLoader(folder, model.spec),
        # Torch's threads start from the engine's and may go where it may; the kernels' are pinned one by one.
        thread_cores=cores[:1] if model.kernels is not None else cores,
    )


def _open_board(settings: EngineSettings, cores: tuple[int, ...]) -> CoreBoard | None:
    if settings.core_board is None or not cores:
        return None
    try:
        return CoreBoard(Path(settings.core_board), available_cores())
    except OSError as error:
        raise ConfigError(
            f"{settings.core_board} cannot be used as --core-board: {error.strerror}; choose another file"
        ) from error


def _put_on_kernels(model: LoadedModel, settings: EngineSettings) -> LoadedModel:
    if settings.kernels == "auto":
        return fuse_model(model, int8=settings.quantize == "int8")
    if settings.quantize != "none":
        raise ConfigError("int8 needs compiled kernels: leave --kernels at auto, or --quantize at none")
    if settings.kv_dtype == "int8":
        raise ConfigError("KV in int8 needs compiled kernels: leave --kernels at auto, or --kv-dtype at auto")
    return model


def _make_pool(layout: KVLayout, num_blocks: int, block_size: int, model: LoadedModel) -> PagedKVCache:
    try:
        return PagedKVCache(layout, num_blocks, block_size, model.device, model.kernels)
    except RuntimeError as error:  # torch's error for memory that cannot be had
        num_mib = num_blocks * block_size * layout.bytes_per_token // BYTES_PER_MIB
        message = (
            f"{num_mib} MiB for KV blocks cannot be had on {model.device}; choose a smaller --kv-cache-mib or --num-kv-blocks"
        )
        raise ConfigError(message) from error


def resolve_model(settings: EngineSettings) -> Path:
    """The folder of the model that the settings name.

    Raises:
        ModelLoadError: there is none.
    """
    root = Path(settings.model_dir).expanduser() if settings.model_dir else default_model_dir(os.environ)
    store = ModelStore(root)
    if settings.model == DEMO_MODEL:
        return store.ensure_demo_model()
    return store.resolve(settings.model)


def _limit_context(model: LoadedModel, max_context_tokens: int | None) -> LoadedModel:
    if max_context_tokens is None or max_context_tokens >= model.spec.max_context_tokens:
        return model
    return replace(model, spec=replace(model.spec, max_context_tokens=max_context_tokens))
