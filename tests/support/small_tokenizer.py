"""A byte-level tokenizer of 256 bytes, a few words and special tokens. Every text round-trips."""

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

EOS_TOKEN = "<|eos|>"
SPECIAL_TOKENS = (EOS_TOKEN, "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('role ' + message.role + ' is unknown') }}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> Tokenizer:
    vocabulary = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def eos_token_id(tokenizer: Tokenizer) -> int:
    """Of the token that ends a sequence."""
    token_id = tokenizer.token_to_id(EOS_TOKEN)
    assert token_id is not None
    return token_id


def tokenizer_files(*, chat_template: str | None = CHAT_TEMPLATE) -> dict[str, bytes]:
    """The files that a worker would send."""
    files = {
        "tokenizer.json": make_tokenizer().to_str().encode(),
        "tokenizer_config.json": json.dumps({"eos_token": EOS_TOKEN}).encode(),
    }
    if chat_template is not None:
        files["chat_template.jinja"] = chat_template.encode()
    return files
