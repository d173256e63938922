"""`kvrelay bench peers`: kvrelay and what people would use instead, on the same weights, cores and
requests, in one run.

All engines are loaded, then take turns; whoever has no turn is stopped. See `workloads` for what
they are asked to do.
"""

import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import report
from benchmarks.peers import result_tables
from benchmarks.peers.adapters.adapter_loop import Options
from benchmarks.peers.catalogue import Peer, choose_peers, choose_workloads
from benchmarks.peers.install import DEFAULT_FOLDER
from benchmarks.peers.measures import IncompleteRunError, measure
from benchmarks.peers.model_conversion import converted_folder, ensure_converted
from benchmarks.peers.peer_process import PeerError, PeerProcess
from benchmarks.peers.results import make_results
from benchmarks.peers.rounds import turns
from benchmarks.peers.workloads import runs_of, warm_up
from kvrelay.errors import ConfigError, StartupError
from kvrelay.models.store import ModelStore, default_model_dir
from kvrelay.own_packages import own_module_command


def command(
    peers: Annotated[
        str, typer.Option(help="Peers by name, separated by commas; all; or a beginning with *: 'kvrelay*'.")
    ] = "all",
    workloads: Annotated[str, typer.Option(help="w1, ttft, w2, w3, separated by commas; or all.")] = "all",
    threads: Annotated[str, typer.Option(help="Threads, and cores, of an engine: numbers separated by commas.")] = "2",
    rounds: Annotated[int, typer.Option(min=1, help="How often each engine has a turn at each workload.")] = 3,
    stream_tokens: Annotated[int, typer.Option(min=2, help="New tokens of each of w3's streams.")] = 600,
    model: Annotated[str, typer.Option(help="A name in the model store, or a folder.")] = "smollm2-135m-instruct",
    venvs: Annotated[
        Path, typer.Option(help="Folder of the peers' environments: python -m benchmarks.peers.install.")
    ] = DEFAULT_FOLDER,
    logs: Annotated[
        Path | None, typer.Option(help="Folder for what the engines write. Default: a temporary one.")
    ] = None,
    json: report.Json = None,
    plots: report.Plots = None,
) -> None:
    """kvrelay and what people would use instead, on the same weights, cores and requests, in one
    run.
    """
    output = report.Report("peers", json, plots)
    chosen, wanted = choose_peers(peers), choose_workloads(workloads)
    folder = _model_folder(model)
    with tempfile.TemporaryDirectory() as temporary:
        comparison = Comparison(output, venvs.expanduser().absolute(), folder, logs or Path(temporary), stream_tokens)
        for num_threads in _numbers(threads):
            comparison.compare(chosen, wanted, num_threads, rounds)
    results = make_results(comparison.values, comparison.versions)
    output.add(*results)
    result_tables.print_tables(output, results)
    result_tables.draw_plots(output, results)
    output.finish()


@dataclass(slots=True)
class Comparison:
    """One run of the benchmark; collects values.

    Args:
        output: gets progress, and notes on peers that drop out.
        venvs: folder of the environments.
        model_folder: the model in safetensors.
        logs: folder for the engines' output.
        stream_tokens: see `workloads.runs_of`.
    """

    output: report.Report
    venvs: Path
    model_folder: Path
    logs: Path
    stream_tokens: int
    values: dict[tuple[str, int, str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    """By peer, threads, run and measure: one value per round."""
    versions: dict[str, str] = field(default_factory=dict)
    _running: dict[str, PeerProcess] = field(default_factory=dict)

    def compare(self, peers: Sequence[Peer], workloads: Sequence[str], num_threads: int, num_rounds: int) -> None:
        """Loads all peers on so many cores, lets them take turns, and ends them. One that fails
        takes no part from then on.
        """
        with ExitStack() as stack:
            self._running = {}
            ready = [
                peer
                for peer in peers
                if set(peer.workloads) & set(workloads) and self._start(peer, workloads, num_threads, stack)
            ]
            for turn in turns(ready, workloads, num_rounds):
                if turn.peer.name in self._running:
                    where = f"round {turn.round_number + 1} of {num_rounds}, {num_threads} threads, {turn.workload}"
                    self.output.progress(f"{where}: {turn.peer.name}")
                    self._take_turn(turn.peer, turn.workload, num_threads, turn.round_number)

    def _start(self, peer: Peer, workloads: Sequence[str], num_threads: int, stack: ExitStack) -> bool:
        """Loads a peer, warms it up and stops it; whether it is ready."""
        if num_threads < peer.min_cores:
            self.output.note(f"{peer.name} takes no part with {num_threads} threads: it needs {peer.min_cores}")
            return False
        self.output.progress(f"loading {peer.name}, {num_threads} threads")
        process = None
        try:
            if peer.conversion is not None:
                ensure_converted(self.venvs, self.model_folder, peer.conversion)
            process = stack.enter_context(self._spawn(peer, num_threads))
            loaded = process.load(self._options(peer, num_threads))
            for workload in workloads:
                if workload in peer.workloads:
                    process.run(warm_up(workload))
        except (PeerError, StartupError) as error:
            self.output.note(f"{peer.name} takes no part with {num_threads} threads: {error}")
            if process is not None:
                process.close()
            return False
        self.versions[peer.name] = loaded["version"]
        self._record(
            peer, num_threads, "load", {"load_s": loaded["load_s"], "resident_mib": process.resident_bytes / 2**20}
        )
        process.pause()
        self._running[peer.name] = process
        return True

    def _spawn(self, peer: Peer, num_threads: int) -> PeerProcess:
        python = sys.executable if peer.environment is None else str(self.venvs / peer.environment / "bin" / "python")
        if not Path(python).exists():
            advice = f"python -m benchmarks.peers.install {peer.environment} --into {self.venvs}"
            raise StartupError(f"its environment is not installed; install it: {advice}")
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / f"{peer.name}-{num_threads}.log"
        command = own_module_command(f"benchmarks.peers.adapters.{peer.adapter}", python=python)
        return PeerProcess(command, _thread_environment(num_threads), log)

    def _options(self, peer: Peer, num_threads: int) -> Options:
        cores = sorted(os.sched_getaffinity(0))[:num_threads]
        if len(cores) < num_threads:
            raise ConfigError(f"{num_threads} threads need as many cores; this process may use {len(cores)}")
        return Options(
            model_folder=str(self.model_folder),
            converted_folder=str(converted_folder(self.venvs, self.model_folder)),
            weights=peer.weights,
            cores=cores,
            chunk_tokens=peer.chunk_tokens,
        )

    def _take_turn(self, peer: Peer, workload: str, num_threads: int, round_number: int) -> None:
        process = self._running[peer.name]
        process.resume()
        try:
            for run in runs_of(workload, round_number, self.stream_tokens):
                self._record(peer, num_threads, run.name, measure(run, process.run(run.requests)))
            process.pause()
        except (PeerError, IncompleteRunError) as error:
            self.output.note(f"{peer.name} drops out at {workload} with {num_threads} threads: {error}")
            del self._running[peer.name]
            process.close()

    def _record(self, peer: Peer, num_threads: int, run: str, measures: Mapping[str, float]) -> None:
        for name, value in measures.items():
            self.values[peer.name, num_threads, run, name].append(value)


def _thread_environment(num_threads: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(num_threads), "MKL_NUM_THREADS": str(num_threads), "TOKENIZERS_PARALLELISM": "false"}


def _model_folder(model: str) -> Path:
    store = ModelStore(default_model_dir(os.environ))
    return store.ensure_demo_model() if model == "smollm2-135m-instruct" else store.resolve(model)


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--threads must be numbers separated by commas, not {text!r}") from None
    if min(numbers) < 1:
        raise ConfigError("--threads must be 1 or more")
    return numbers
