"""One conversation: its messages, and the tokens of earlier turns, kept as they were so that their KV is found again."""

from collections.abc import Sequence

from gateway.chat_template import Message
from gateway.prompt_preparation import encode_rendered, render_chat
from gateway.tokenizer import ModelTokenizer

MAX_MESSAGES = 4096


class Conversation:
    """History of one Converse stream.

    The prompt of a turn is the rendered history. Where it begins with what is already tokenized, the earlier prompt and the
    tokens of its answer, only the rest is tokenized: the answer's text, tokenized again, could give tokens that no cache knows.

        token_ids   |<- earlier prompt ->|<- generated ->|<- new: end of turn, next messages, generation prompt ->|
    """

    def __init__(self, tokenizer: ModelTokenizer) -> None:
        self.decode_worker_id: str | None = None
        """Where the last turn ran, and its KV is warm."""
        self._tokenizer = tokenizer
        self._messages: list[Message] = []
        self._token_ids: list[int] = []
        self._text = ""

    @property
    def num_messages(self) -> int:
        return len(self._messages)

    async def add_messages(self, messages: Sequence[Message]) -> list[int]:
        """Appends messages and returns the next turn's prompt.

        Raises:
            InvalidRequestError: the template refuses them.
            NoChatTemplateError: the model has none.
        """
        rendered = await render_chat(self._tokenizer, [*self._messages, *messages], "messages")
        self._messages.extend(messages)
        if self._text and rendered.startswith(self._text):
            rest = await encode_rendered(self._tokenizer, rendered[len(self._text) :])
            self._token_ids = [*self._token_ids, *rest]
        else:
            self._token_ids = await encode_rendered(self._tokenizer, rendered)
        self._text = rendered
        return list(self._token_ids)

    def add_answer(self, token_ids: Sequence[int], text: str) -> None:
        """Appends the assistant's answer.

        Args:
            token_ids: as generated, with the token that ended it.
            text: as the client saw it.
        """
        self._messages.append({"role": "assistant", "content": text})
        # With its special tokens: a template writes the one that ended the answer, so that is tokenized already too.
        generated = self._tokenizer.decode(token_ids, keep_special_tokens=True)
        self._text += generated
        self._token_ids = [*self._token_ids, *token_ids]
