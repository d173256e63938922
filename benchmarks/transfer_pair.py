"""Two processes that send each other KV: a prefill worker's sender and a decode worker's receiver,
on one host.
"""

import json
import secrets
import subprocess
from dataclasses import asdict, dataclass
from typing import Any

from kvrelay.core.model_spec import KVLayout
from kvrelay.own_packages import own_module_command


class PairError(RuntimeError):
    """A measured transfer failed: its figures would mean nothing."""


@dataclass(frozen=True, slots=True)
class Pass:
    """How a prompt's pass is imitated: its layers are announced as it would, while its thread
    computes.
    """

    tokens_per_s: float
    chunk_tokens: int


@dataclass(frozen=True, slots=True)
class Transfer:
    """One measured transfer. Times in seconds; CPU time is both processes' and leaves out the pass
    itself.
    """

    kv_bytes: int
    wire_s: float
    """In which a chunk was under way: what GB/s means."""
    total_s: float
    """From the push's begin to the moment when the receiver's engine may run the sequence."""
    exposed_s: float
    """As the sender reports it: from the first token to the last acknowledgement."""
    handoff_s: float
    """From the first token to the moment when the receiver's engine may run the sequence."""
    ttft_s: float
    """From the push's begin to the first token."""
    cpu_s: float
    transport: str


class TransferPair:
    """Both processes, for one layout and one transport. A context manager.

    Args:
        layout: of the KV.
        max_tokens: longest transfer.
        settings: fields of TransferSettings, for the sender.
        certificates: folder with one for each role; None speaks plain text.
    """

    def __init__(
        self, layout: KVLayout, max_tokens: int, settings: dict[str, Any], certificates: str | None = None
    ) -> None:
        setup = {
            "layout": asdict(layout),
            "num_tokens": max_tokens,
            "settings": settings,
            "certificates": certificates,
        }
        self._receiver = _End("receive", setup)
        self._sender = _End("send", setup)
        self._settings = settings
        self._address = self._receiver.ask(do="listen")["address"]

    def __enter__(self) -> "TransferPair":
        return self

    def __exit__(self, *_: object) -> None:
        self._sender.close()
        self._receiver.close()

    @property
    def process_ids(self) -> tuple[int, int]:
        """Of the sender and of the receiver."""
        return self._sender.process_id, self._receiver.process_id

    def transfer(self, num_tokens: int, paced: Pass | None = None) -> Transfer:
        """Sends the KV of so many tokens.

        Raises:
            PairError: it did not arrive.
        """
        request_id = secrets.token_hex(16)
        ticket = self._receiver.ask(do="reserve", request_id=request_id, num_tokens=num_tokens)["ticket"]
        command: dict[str, Any] = {
            "request_id": request_id,
            "ticket": ticket,
            "address": self._address,
            "num_tokens": num_tokens,
        }
        if paced is not None:
            command |= {"pass_s": num_tokens / paced.tokens_per_s, "chunk_tokens": paced.chunk_tokens}
        sent = self._sender.ask(do="push", **command)
        received = self._receiver.ask(do="received")
        if problem := sent["problem"] or received["problem"]:
            raise PairError(f"a transfer of {num_tokens} tokens failed: {problem}")
        return Transfer(
            kv_bytes=sent["kv_bytes"],
            wire_s=sent["wire_ms"] / 1000,
            total_s=received["at"] - sent["begin"],
            exposed_s=sent["exposed_ms"] / 1000,
            handoff_s=received["at"] - sent["sampled_at"],
            ttft_s=sent["sampled_at"] - sent["begin"],
            cpu_s=sent["cpu_s"] + received["cpu_s"],
            transport=sent["transport"],
        )

    def check(self, num_tokens: int) -> None:
        """Raises PairError unless the receiver's pool holds what the sender's does."""
        if self._sender.ask(do="digest", num_tokens=num_tokens) != self._receiver.ask(
            do="digest", num_tokens=num_tokens
        ):
            raise PairError("the KV that arrived is not the KV that was sent")


class _End:
    """One of the processes."""

    def __init__(self, role: str, setup: dict[str, Any]) -> None:
        command = own_module_command("benchmarks.transfer_process", role)
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
        self._write(setup)

    @property
    def process_id(self) -> int:
        return self._process.pid

    def ask(self, **command: Any) -> dict[str, Any]:
        self._write(command)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PairError("a process of the pair ended; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _write(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
