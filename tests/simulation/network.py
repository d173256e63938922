"""gRPC between simulated processes: streams that are in order each, and late, held back, cut or
broken off as faults want it.

    client's end  --request, request, half close, cancel-->  server's end
                  <------response, response, status--------

A message takes a latency drawn by the seed. Between two places one direction can be closed for a
while: what is sent meanwhile arrives when it is open again, as with TCP. A process that dies resets
its streams; what it has sent may be lost with it.

Knows nothing of what is sent, but lets one filter change, repeat or drop it.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import grpc

from kvrelay.errors import KvrelayError
from kvrelay.security.guard import Guard
from kvrelay.security.principal import set_current_principal
from kvrelay.wire.errors import DETAILS_METADATA_KEY, code_of, status_of
from tests.simulation.virtual_time import ProcessLoop, World

MAX_UNREAD_MESSAGES = 32
"""A stream's sender waits behind so many."""
_EMPTY = grpc.aio.Metadata()


def failure_of(
    code: grpc.StatusCode, details: str, trailing: "grpc.aio.Metadata | None" = None
) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, _EMPTY, trailing or _EMPTY, details)


def _status_of(failure: BaseException) -> grpc.aio.AioRpcError:
    if not isinstance(failure, KvrelayError):
        return failure_of(grpc.StatusCode.INTERNAL, "internal error")
    details = grpc.aio.Metadata((DETAILS_METADATA_KEY, status_of(failure).SerializeToString()))
    return failure_of(code_of(failure), failure.message, details)


class Place:
    """A process as the network sees it."""

    def __init__(self, loop: ProcessLoop, address: str) -> None:
        self.loop = loop
        self.address = address
        self.handlers: list[Any] = []
        self.guard: Guard | None = None
        """Of its server. None: every caller is let in."""
        self.certificate: Mapping[str, list[bytes]] = {}
        """What servers see of it."""
        self.is_listening = False
        self.ends: dict[End, None] = {}
        """Ends of open streams, in the order of their beginning."""

    # What generated code asks of a server.
    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        self.handlers.extend(handlers)

    def add_registered_method_handlers(self, service_name: str, handlers: Any) -> None:
        """The generic ones are enough."""


class Network:
    """All streams of a world.

    Args:
        world: clock and chance.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.change_request: Callable[[str, Any], list[Any]] = lambda method, message: [message]
        """From a request on its way, what arrives."""
        self.trace: Callable[[str], None] | None = None
        """Gets a line for every message that arrives and for every end."""
        self._listeners: dict[str, Place] = {}
        self._closed_until: dict[tuple[str, str], float] = {}
        self._on_held: dict[tuple[str, str], Callable[[], None]] = {}
        self._waiting_calls: dict[str, list[Callable[[], None]]] = {}

    def listen(self, place: Place) -> None:
        """The process takes calls under its address from now on."""
        place.is_listening = True
        self._listeners[place.address] = place
        for connect in self._waiting_calls.pop(place.address, ()):
            connect()

    def stop_listening(self, place: Place) -> None:
        place.is_listening = False
        if self._listeners.get(place.address) is place:
            del self._listeners[place.address]

    def listener(self, address: str) -> Place | None:
        return self._listeners.get(address)

    def wait_for(self, address: str, connect: Callable[[], None]) -> None:
        """Called as soon as somebody listens there."""
        self._waiting_calls.setdefault(address, []).append(connect)

    def close_direction(self, source: str, target: str, seconds: float, on_held: Callable[[], None]) -> None:
        """Nothing gets from one address to the other for so long; says once when something was held
        back.
        """
        self._closed_until[source, target] = self.world.now + seconds
        self._on_held[source, target] = on_held

    def latency_s(self) -> float:
        random = self.world.random
        return random.uniform(0.0001, 0.0015) if random.random() < 0.93 else random.uniform(0.002, 0.03)

    def arrival(self, source: str, target: str) -> float:
        """When what is sent now arrives."""
        begin = self.world.now
        if self._closed_until and (open_at := self._closed_until.get((source, target), 0.0)) > begin:
            begin = open_at
            if (on_held := self._on_held.pop((source, target), None)) is not None:
                on_held()
        return begin + self.latency_s()

    def process_died(self, place: Place) -> None:
        """Resets all its streams."""
        self.stop_listening(place)
        loses = self.world.random.random() < 0.5
        for end in list(place.ends):
            end.peer_lost(loses)
        place.ends.clear()

    def cut(self, place: Place, other_address: str) -> int:
        """Breaks all streams between a process and an address. How many there were."""
        ends = [end for end in place.ends if end.peer is not None and end.peer.place.address == other_address]
        for end in ends:
            assert end.peer is not None
            end.finish(failure_of(grpc.StatusCode.UNAVAILABLE, "connection reset"))
            end.peer.finish(failure_of(grpc.StatusCode.UNAVAILABLE, "connection reset"))
        return len(ends)


class End:
    """One end of one stream."""

    def __init__(self, network: Network, place: Place, method: str) -> None:
        self.network = network
        self.place = place
        self.method = method
        self.peer: End | None = None
        self.failure: grpc.aio.AioRpcError | None = None
        self.is_over = False
        self.on_over: list[Callable[[Any], None]] = []
        self._inbox: deque[Any] = deque()
        self._half_closed = False
        self._changed: list[asyncio.Future[None]] = []
        self._num_unread = 0
        """Messages sent and not read, as far as this end knows."""
        self._num_read = 0
        self._last_arrival = 0.0
        self._loses_rest = False
        place.ends[self] = None

    # --- sending

    def send(self, call: Callable[..., None], *arguments: Any) -> None:
        """Calls at the other end, in order."""
        peer = self.peer
        if peer is None:
            return
        due = max(self.network.arrival(self.place.address, peer.place.address), self._last_arrival)
        self._last_arrival = due
        self.network.world.schedule(peer.place.loop, due, self._arrive, (call, arguments))

    def _arrive(self, call: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if not self._loses_rest:
            call(*arguments)

    async def write_message(self, message: Any) -> None:
        while self._num_unread >= MAX_UNREAD_MESSAGES and not self.is_over:
            await self._wait()
        if self.is_over:
            raise asyncio.InvalidStateError("the call has ended")
        assert self.peer is not None
        self._num_unread += 1
        self.send(self.peer.take, message)

    # --- what arrives

    def take(self, message: Any) -> None:
        if self.network.trace is not None:
            self._trace(_brief(message))
        if not self.is_over:
            self._inbox.append(message)
            self._wake()

    def take_credit(self, num_messages: int) -> None:
        self._num_unread -= num_messages
        self._wake()

    def take_half_close(self) -> None:
        self._half_closed = True
        self._wake()

    def peer_lost(self, loses: bool) -> None:
        """This process died: the other end learns of it."""
        if self.peer is None or self.is_over:
            return
        self._loses_rest = loses
        peer, failure = self.peer, failure_of(grpc.StatusCode.UNAVAILABLE, "connection reset")
        due = max(self.network.arrival(self.place.address, peer.place.address), self._last_arrival)
        self.network.world.schedule(peer.place.loop, due, peer.finish, (failure,))

    def finish(self, failure: grpc.aio.AioRpcError | None) -> None:
        """The stream is over here; what came before can still be read."""
        if self.is_over:
            return
        self.is_over = True
        self.failure = failure
        if self.network.trace is not None:
            self._trace("the end: " + ("OK" if failure is None else f"{failure.code().name} {failure.details()}"))
        self.place.ends.pop(self, None)
        self._wake()
        for callback in self.on_over:
            callback(self)

    def _trace(self, what: str) -> None:
        if self.network.trace is not None and self.peer is not None:
            service, method = self.method.split("/")[1:]
            name = method if method != "Session" else service.rpartition(".")[2].removesuffix("Service")
            self.network.trace(f"<- {self.peer.place.address} {name}: {what}")

    # --- reading

    async def read_message(self) -> Any:
        """The next message, or EOF at the end, however it ended."""
        while not self._inbox and not self._half_closed and not self.is_over:
            await self._wait()
        if not self._inbox:
            return grpc.aio.EOF
        self._num_read += 1
        if self._num_read % 8 == 0 and self.peer is not None:
            self.send(self.peer.take_credit, 8)
        return self._inbox.popleft()

    async def _wait(self) -> None:
        future = asyncio.get_running_loop().create_future()
        self._changed.append(future)
        await future

    def _wake(self) -> None:
        waiting, self._changed = self._changed, []
        for future in waiting:
            if not future.done():
                future.set_result(None)


def _brief(message: Any) -> str:
    """A message for a trace."""
    if isinstance(message, bytes):
        return f"{len(message)} bytes"
    return " ".join(str(message).split())[:300]


class ClientCall(End):
    """What a stub's call gives."""

    def __init__(
        self, network: Network, place: Place, address: str, method: str, timeout_s: float | None, metadata: Any = None
    ) -> None:
        super().__init__(network, place, method)
        self._address = address
        self._metadata = tuple(metadata or ())
        self._timeout_s = timeout_s
        self._connected = asyncio.get_running_loop().create_future()
        if timeout_s is not None:
            place.loop.call_later(timeout_s, self._expire)

    def connect(self, *, waits: bool, request: Any = None) -> None:
        """Reaches the server, or fails; with `waits` as soon as there is one."""
        arrival = self.network.arrival(self.place.address, self._address)
        self.network.world.schedule(self.place.loop, arrival, self._reach, (waits, request))

    def _reach(self, waits: bool, request: Any) -> None:
        if self.is_over:
            return
        listener = self.network.listener(self._address)
        if listener is None and waits:
            self.network.wait_for(self._address, lambda: self.connect(waits=True, request=request))
            return
        if listener is None:
            self.finish(failure_of(grpc.StatusCode.UNAVAILABLE, "nobody listens there"))
            return
        server_end = ServerContext(self.network, listener, self.method, self._timeout_s, self._metadata)
        self.peer, server_end.peer = server_end, self
        self.network.world.schedule(listener.loop, self.network.world.now, server_end.serve, (request,))
        self._connected.set_result(None)

    async def write(self, message: Any) -> None:
        await self._connection()
        if self.failure is not None:
            raise self.failure
        for arriving in self.network.change_request(self.method, message):
            await self.write_message(arriving)

    async def read(self) -> Any:
        await self._connection()
        message = await self.read_message()
        if message is grpc.aio.EOF and self.failure is not None:
            raise self.failure
        return message

    def done(self) -> bool:
        return self.is_over

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Does nothing: no later write replaces the status of a simulated call."""

    async def _connection(self) -> None:
        if not self._connected.done():
            await asyncio.shield(self._connected)

    async def __aiter__(self) -> AsyncIterator[Any]:
        while (message := await self.read()) is not grpc.aio.EOF:
            yield message

    def cancel(self) -> bool:
        """Ends the call from this side."""
        if self.is_over:
            return False
        if self.peer is not None:
            self.send(self.peer.finish, failure_of(grpc.StatusCode.CANCELLED, "cancelled"))
        self.finish(failure_of(grpc.StatusCode.CANCELLED, "cancelled"))
        self._inbox.clear()
        return True

    def finish(self, failure: grpc.aio.AioRpcError | None) -> None:
        super().finish(failure)
        if not self._connected.done():
            self._connected.set_result(None)

    def _expire(self) -> None:
        if self.cancel():
            self.failure = failure_of(grpc.StatusCode.DEADLINE_EXCEEDED, "deadline exceeded")


class ServerContext(End):
    """What a handler gets as its context."""

    def __init__(
        self, network: Network, place: Place, method: str, timeout_s: float | None, metadata: tuple[Any, ...]
    ) -> None:
        super().__init__(network, place, method)
        self._metadata = metadata
        self._deadline = None if timeout_s is None else network.world.now + timeout_s
        self._task: asyncio.Task[None] | None = None

    def serve(self, request: Any) -> None:
        """Begins the handler."""
        if self.is_over:
            return
        loop = self.place.loop
        self._task = loop.create_task(self._handle(request), name=self.method)
        if self._deadline is not None:
            loop.call_at(
                self._deadline, self.finish, failure_of(grpc.StatusCode.DEADLINE_EXCEEDED, "deadline exceeded")
            )

    async def _handle(self, request: Any) -> None:
        failure: grpc.aio.AioRpcError | None = None
        try:
            handler = self._find_handler()
            with self._admitted():
                if handler.response_streaming:
                    behaviour = handler.stream_stream if handler.request_streaming else handler.unary_stream
                    await behaviour(request, self)
                else:
                    await self.write(await handler.unary_unary(request, self))
        except asyncio.CancelledError:
            return
        except KvrelayError as error:
            failure = _status_of(error)
        except Exception as error:
            if not self.is_over:  # a write to a call that has ended fails somehow
                self.network.world.problems.append(f"{self.place.loop.name}: {self.method} failed: {error!r}")
            failure = _status_of(error)
        if not self.is_over:
            assert self.peer is not None
            self.send(self.peer.finish, failure)
            self.finish(failure)

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        """As the interceptor of production's servers."""
        guard = self.place.guard
        if guard is None:
            yield
            return
        assert self.peer is not None
        caller = self.peer.place
        principal = guard.check(self.method, self._metadata, caller.certificate, caller.address)
        set_current_principal(principal)
        with guard.following(principal):
            yield

    def _find_handler(self) -> Any:
        details = _CallDetails(self.method)
        return next(found for handler in self.place.handlers if (found := handler.service(details)) is not None)

    def finish(self, failure: grpc.aio.AioRpcError | None) -> None:
        was_over = self.is_over
        super().finish(failure)
        if not was_over and failure is not None and self._task is not None:
            self._task.cancel()

    # --- what handlers use

    async def read(self) -> Any:
        return await self.read_message()

    async def write(self, message: Any) -> None:
        await self.write_message(message)

    def time_remaining(self) -> float | None:
        return None if self._deadline is None else max(self._deadline - self.network.world.now, 0.0)

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self.on_over.append(callback)

    def invocation_metadata(self) -> tuple[Any, ...]:
        return self._metadata


class _CallDetails:
    def __init__(self, method: str) -> None:
        self.method = method
        self.invocation_metadata = ()


class SimulatedChannel:
    """What `create_channel` gives to a process.

    Args:
        network: of the world.
        place: whose channel it is.
        address: of the server.
    """

    def __init__(self, network: Network, place: Place, address: str) -> None:
        self._network = network
        self._place = place
        self._address = address

    async def __aenter__(self) -> "SimulatedChannel":
        return self

    async def __aexit__(self, *details: object) -> None:
        return None

    async def close(self, grace: float | None = None) -> None:
        return None

    def stream_stream(self, method: str, **options: Any) -> Callable[..., ClientCall]:
        def call(
            request_iterator: None = None,
            *,
            wait_for_ready: bool = False,
            timeout: float | None = None,  # as gRPC's stubs have it
            metadata: Any = None,
        ) -> ClientCall:
            made = ClientCall(self._network, self._place, self._address, method, timeout, metadata)
            made.connect(waits=wait_for_ready)
            return made

        return call

    def unary_stream(self, method: str, **options: Any) -> Callable[..., ClientCall]:
        def call(request: Any, *, timeout: float | None = None, metadata: Any = None) -> ClientCall:
            made = ClientCall(self._network, self._place, self._address, method, timeout, metadata)
            made.connect(waits=False, request=request)
            return made

        return call

    def unary_unary(self, method: str, **options: Any) -> Callable[..., Any]:
        async def call(
            request: Any,
            *,
            timeout: float | None = None,  # noqa: ASYNC109  # as gRPC's stubs have it
            metadata: Any = None,
            wait_for_ready: bool = False,
        ) -> Any:
            made = ClientCall(self._network, self._place, self._address, method, timeout, metadata)
            made.connect(waits=wait_for_ready, request=request)
            return await made.read()

        return call
