"""A chat's messages, and the gateway's conversation that continues them.

A turn that fails or is left early ends the gateway's conversation. The next turn starts a new one
with all messages.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvrelay.errors import PreconditionError

if TYPE_CHECKING:
    from kvrelay.client import ChatMessage, Conversation, Turn


class ChatSession:
    """`turn = session.send("Hello")`, then one of `keep_answer` and `take_back`."""

    def __init__(self, converse: "Callable[[], Conversation]", system: str | None) -> None:
        self.system = system
        self._converse = converse
        self._conversation: Conversation | None = None
        self._messages: list[ChatMessage] = []

    def send(self, text: str) -> "Turn":
        """Changes nothing when it raises InvalidRequestError."""
        from kvrelay.client import ChatMessage

        message = ChatMessage("user", text)
        if self._conversation is None:
            self._conversation = self._converse()
            system = [] if self.system is None else [ChatMessage("system", self.system)]
            turn = self._conversation.send([*system, *self._messages, message])
        else:
            turn = self._conversation.send([message])
        self._messages.append(message)
        return turn

    def keep_answer(self, text: str, *, is_whole: bool = True) -> None:
        """Ends a turn with what there is of its answer; without any, drops the message."""
        from kvrelay.client import ChatMessage

        if is_whole or text:
            self._messages.append(ChatMessage("assistant", text))
        else:
            self._messages.pop()
        if not is_whole:
            self.close()

    def take_back(self) -> None:
        """Drops a turn that failed."""
        self._messages.pop()
        self.close()

    def last_message(self) -> str:
        """Drops the last turn and returns its message. Raises PreconditionError if there is none."""
        if not self._messages:
            raise PreconditionError("there is no message yet that could be answered again")
        self._messages.pop()
        text = self._messages.pop().content
        self.close()
        return text

    def set_system(self, text: str) -> None:
        self.system = text
        self.close()

    def clear(self) -> None:
        """Keeps the system message only."""
        self._messages.clear()
        self.close()

    def close(self) -> None:
        """Ends the gateway's conversation. The next turn starts a new one."""
        conversation, self._conversation = self._conversation, None
        if conversation is not None:
            conversation.close()
