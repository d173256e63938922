"""One Converse stream's messages and tokens."""

from collections.abc import Sequence

from gateway.requests.prompt_preparation import prompt_bound
from gateway.text.template_source import Message
from gateway.text.texts import Texts
from gateway.text.tokenizer import ModelTokenizer
from gateway.workers.served_models import ModelLimits


class Conversation:
    """Tokenizes only new messages, so that the prompt begins with cached tokens.

    token_ids  |<- earlier prompt ->|<- generated ->|<- new: end of turn, messages, prompt ->|
    """

    def __init__(self, tokenizer: ModelTokenizer, limits: ModelLimits, texts: Texts) -> None:
        self.decode_worker_id: str | None = None
        """Has the last turn's KV."""
        self._tokenizer = tokenizer
        self._bound = prompt_bound(limits)
        self._texts = texts
        self._messages: list[Message] = []
        self._token_ids: list[int] = []
        self._text = ""
        self._answer_ids: list[int] = []
        """Not yet in `_text`."""

    @property
    def num_messages(self) -> int:
        return len(self._messages)

    async def add_messages(self, messages: Sequence[Message], deadline: float) -> list[int]:
        """Returns the next turn's prompt. Unusable after an error. `deadline` in monotonic seconds.

        Raises as `Texts.render` and `Texts.encode`.
        """
        await self._read_answer(deadline)
        history = [*self._messages, *messages]
        rendered = await self._texts.render(self._tokenizer, history, "messages", self._bound, deadline)
        self._messages.extend(messages)
        if self._text and rendered.startswith(self._text):
            rest = await self._encode(rendered[len(self._text) :], deadline)
            self._token_ids = [*self._token_ids, *rest]
        else:
            self._token_ids = await self._encode(rendered, deadline)
        self._text = rendered
        return list(self._token_ids)

    def add_answer(self, token_ids: Sequence[int], text: str) -> None:
        """`token_ids` include the one that ended the answer."""
        self._messages.append({"role": "assistant", "content": text})
        self._token_ids = [*self._token_ids, *token_ids]
        self._answer_ids.extend(token_ids)

    async def _read_answer(self, deadline: float) -> None:
        # Special tokens stay: the template also writes the one that ended the answer.
        self._text += await self._texts.decode(self._tokenizer, self._answer_ids, deadline, keep_special_tokens=True)
        self._answer_ids = []

    async def _encode(self, text: str, deadline: float) -> list[int]:
        return await self._texts.encode(self._tokenizer, text, self._bound, deadline, rendered=True)
