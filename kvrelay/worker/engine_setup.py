"""Builds a worker's model, pool and block manager from its settings."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from kvrelay.config.settings import BYTES_PER_MIB, EngineSettings
from kvrelay.core.model_spec import KVLayout, ModelSpec
from kvrelay.core.prompt_pace import CHUNK_S, FIRST_CHUNK_TOKENS, LEAST_CHUNK_TOKENS, MAX_CHUNK_TOKENS, ChunkRange
from kvrelay.engine.kernel_backend import plain_rows_error, use_native_kernels, with_kv_dtype
from kvrelay.engine.mapped_weights import release_weight_pages
from kvrelay.engine.model_loader import choose_device, choose_dtype, load_model
from kvrelay.engine.model_runner import LoadedModel, ModelRunner, use_torch_threads
from kvrelay.engine.native.core_sharing import CoreActivityTable
from kvrelay.engine.paged_kv_cache import PagedKVCache
from kvrelay.errors import ConfigError
from kvrelay.kv_cache.block_manager import BlockManager
from kvrelay.kv_cache.memory_planning import blocks_for_budget
from kvrelay.models.generation_config import read_sampling_defaults
from kvrelay.models.store import DEMO_MODEL, ModelStore, default_model_dir
from kvrelay.runtime.cpu_cores import (
    ProcessorShare,
    available_cores,
    format_cores,
    parse_cores,
    pin_this_thread,
    processor_share,
)
from kvrelay.worker.job_preparation import GrammarLoader
from kvrelay.worker.step_runner import StepRunner

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerEngine:
    """`blocks` and both runners belong to the engine thread."""

    folder: Path
    model: ModelSpec
    cache: PagedKVCache
    blocks: BlockManager
    model_runner: ModelRunner
    step_runner: StepRunner
    grammars: GrammarLoader
    thread_cores: tuple[int, ...] = ()
    """Of the engine thread; empty: any."""

    def pin_thread(self) -> None:
        if self.thread_cores and not pin_this_thread(self.thread_cores):
            _log.warning(
                "the engine cannot be kept to its cores; it runs anywhere", cores=format_cores(self.thread_cores)
            )

    @property
    def description(self) -> str:  # what computes
        model = self.model_runner.model
        described = "torch" if model.kernels is None else model.kernels.description
        return f"{model.scheme}, {described}" if model.scheme else described

    @property
    def adapts_chunks(self) -> bool:
        """Only where a row has the same bits in any chunk, so that a prompt has the same tokens."""
        return self.model_runner.model.decoder is not None

    @property
    def max_sequence_tokens(self) -> int:
        return min(self.model.max_context_tokens, self.blocks.num_blocks * self.blocks.block_size)


def build_engine(settings: EngineSettings) -> WorkerEngine:
    """Loads the model and makes its pool.

    Raises:
        ModelLoadError: the model is missing, broken or unsupported.
        ConfigError: the memory for KV holds no block, or cannot be allocated.
    """
    cores = parse_cores(settings.cores) if settings.cores else ()
    num_threads = settings.num_threads or len(cores) or default_num_threads(processor_share())
    use_torch_threads(num_threads)
    folder = resolve_model(settings)
    device = choose_device(settings.device)
    name = settings.served_model_name or folder.name
    loaded = load_model(
        folder, name, choose_dtype(settings.dtype, device), device, for_kernels=settings.kernels == "auto"
    )
    model = with_kv_dtype(_put_on_kernels(loaded, settings), settings.kv_dtype)
    model = _limit_context(model, settings.max_context_tokens)
    model = _with_sampling_defaults(model, folder, settings)
    if model.kernels is not None:
        num_threads_in_all = model.kernels.use_threads(num_threads, cores, _open_activity_table(settings, cores))
        _log.info(
            "kernels loaded",
            variant=model.kernels.variant,
            prebuilt=model.kernels.prebuilt,
            why_no_better=dict(model.kernels.why_not) or None,
            num_threads=num_threads,
            num_borrowers=num_threads_in_all - num_threads,
        )
        if model.decoder is not None:
            # Torch has little left to do, and its threads would spin on the kernels' cores.
            use_torch_threads(1)
            release_weight_pages()  # the kernels copied nearly all of them
    layout = model.spec.kv_layout
    num_blocks = settings.num_kv_blocks or blocks_for_budget(
        layout, settings.block_size, settings.kv_cache_mib * BYTES_PER_MIB
    )
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
        # Torch's threads start from the engine's and may run on all its cores; the kernels' are
        # pinned one by one.
        thread_cores=cores[:1] if model.kernels is not None else cores,
    )


def prompt_chunk(settings: EngineSettings, engine: WorkerEngine) -> ChunkRange:
    if settings.prefill_chunk_tokens is not None:
        return ChunkRange.fixed(settings.prefill_chunk_tokens)
    if not engine.adapts_chunks:
        return ChunkRange.fixed(FIRST_CHUNK_TOKENS)
    return ChunkRange(FIRST_CHUNK_TOKENS, LEAST_CHUNK_TOKENS, MAX_CHUNK_TOKENS, CHUNK_S)


def default_num_threads(share: ProcessorShare) -> int:
    """All of a container's quota; else half the machine, to leave room for another worker."""
    if share.quota is None:
        return max(1, share.num_threads // 2)
    _log.info("threads follow the CPU quota of the control group", num_threads=share.num_threads, quota=share.quota)
    return share.num_threads


def _open_activity_table(settings: EngineSettings, cores: tuple[int, ...]) -> CoreActivityTable | None:
    if settings.core_sharing_file is None or not cores:
        return None
    try:
        return CoreActivityTable(Path(settings.core_sharing_file), available_cores())
    except OSError as error:
        raise ConfigError(
            f"{settings.core_sharing_file} cannot be used as --core-sharing-file: {error.strerror}; choose another file"
        ) from error


def _put_on_kernels(model: LoadedModel, settings: EngineSettings) -> LoadedModel:
    plain_rows = settings.bfloat16_activations == "plain"
    if settings.kernels == "auto":
        is_int8 = settings.quantize == "int8"
        return use_native_kernels(model, int8=is_int8, plain_rows=plain_rows, variant=settings.kernel_variant)
    if plain_rows:
        raise plain_rows_error()
    if settings.kernel_variant != "auto":
        raise ConfigError("a variant of the kernels needs them: leave --kernels at auto, or --kernel-variant at auto")
    if settings.quantize != "none":
        raise ConfigError("int8 needs compiled kernels: leave --kernels at auto, or --quantize at none")
    if settings.kv_dtype == "int8":
        raise ConfigError("KV in int8 needs compiled kernels: leave --kernels at auto, or --kv-dtype at auto")
    return model


def _make_pool(layout: KVLayout, num_blocks: int, block_size: int, model: LoadedModel) -> PagedKVCache:
    try:
        return PagedKVCache(layout, num_blocks, block_size, model.device, model.kernels)
    except RuntimeError as error:  # torch's error for memory that cannot be allocated
        num_mib = num_blocks * block_size * layout.bytes_per_token // BYTES_PER_MIB
        raise ConfigError(
            f"{num_mib} MiB for KV blocks cannot be had on {model.device};"
            " choose a smaller --kv-cache-mib or --num-kv-blocks"
        ) from error


def resolve_model(settings: EngineSettings) -> Path:
    """Raises ModelLoadError if there is no such model."""
    root = Path(os.path.expanduser(settings.model_dir)) if settings.model_dir else default_model_dir(os.environ)
    store = ModelStore(root)
    if settings.model == DEMO_MODEL:
        return store.ensure_demo_model()
    return store.resolve(settings.model)


def _with_sampling_defaults(model: LoadedModel, folder: Path, settings: EngineSettings) -> LoadedModel:
    if settings.generation_config == "none":
        return model
    defaults = read_sampling_defaults(folder)
    if stated := defaults.stated():
        _log.info("requests that leave it open are sampled as the model's generation_config.json says", **stated)
    return replace(model, spec=replace(model.spec, sampling_defaults=defaults))


def _limit_context(model: LoadedModel, max_context_tokens: int | None) -> LoadedModel:
    if max_context_tokens is None or max_context_tokens >= model.spec.max_context_tokens:
        return model
    return replace(model, spec=replace(model.spec, max_context_tokens=max_context_tokens))
