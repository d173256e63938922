"""Tokenizer and chat template, compared with transformers'."""

import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from gateway.chat_template import ChatTemplate
from gateway.tokenizer import KNOWN_FILES, ModelTokenizer
from kvrelay.errors import InvalidRequestError, NoChatTemplateError, PreconditionError
from tests.gateway.small_tokenizer import tokenizer_files
from tests.tiny_models import save_tiny_tokenizer

TEXTS = ["Hello, world!", "  two  spaces\n\n", "日本語 and 🎉", "<|im_start|>user", "a" * 5000]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 1 < 2 & 'x'?"},
    {"role": "assistant", "content": "True."},
    {"role": "user", "content": "Sure? 🎉"},
]


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name in KNOWN_FILES}


@pytest.mark.parametrize("texts", [TEXTS])
def test_tokens_and_rendered_chats_equal_those_of_transformers(texts: Sequence[str], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_tiny_tokenizer(tmp_path)
    ours, theirs = ModelTokenizer(read_files(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    for text in texts:
        ids = ours.encode_text(text)
        assert ids == theirs(text)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    rendered = ours.render_chat(CHAT)
    assert rendered == theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert ours.encode_rendered(rendered) == theirs(rendered, add_special_tokens=False)["input_ids"]


def test_a_model_without_a_template_takes_no_chat() -> None:
    tokenizer = ModelTokenizer(tokenizer_files(chat_template=None))
    assert not tokenizer.has_chat_template
    with pytest.raises(NoChatTemplateError):
        tokenizer.render_chat(CHAT)


def test_messages_that_the_template_refuses_are_the_clients_mistake() -> None:
    with pytest.raises(InvalidRequestError, match="role wizard is unknown"):
        ModelTokenizer(tokenizer_files()).render_chat([{"role": "wizard", "content": "x"}])


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_file_is_named(name: str) -> None:
    with pytest.raises(PreconditionError, match=name):
        ModelTokenizer({**tokenizer_files(), name: b"{"})


def test_a_broken_template_is_a_precondition() -> None:
    with pytest.raises(PreconditionError, match="template"):
        ChatTemplate("{% for %}", {})


def test_the_template_among_the_tokenizers_settings_is_found() -> None:
    files = tokenizer_files(chat_template=None)
    files["tokenizer_config.json"] = (
        b'{"bos_token": {"content": "<s>"}, "chat_template": "{{ bos_token }}{{ messages[0].content }}"}'
    )
    assert ModelTokenizer(files).render_chat([{"role": "user", "content": "hi"}]) == "<s>hi"


@pytest.mark.parametrize(
    ("source", "rendered"),
    [
        ("{{ messages | tojson }}", '[{"role": "user", "content": "<é>"}]'),
        ("{% for m in messages %}{% if loop.first %}{% break %}{% endif %}{% endfor %}x", "x"),
        ("{% if true %}\n    y\n{% endif %}", "    y\n"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{% for x in [1, 2, 3] if x > 1 %}{{ loop.index }}/{{ loop.length }}{{ loop.last }} {% endfor %}", "1/2False 2/2True "),
        ("{% for x in [[1], [2]] recursive %}{{ x if x is number else loop(x) }}{% else %}none{% endfor %}", "12"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}", "a1"),
        ("{% if tools %}t{% endif %}{{ bos_token }}", "<s>"),
    ],
)
def test_templates_find_what_transformers_gives_them(source: str, rendered: str) -> None:
    template = ChatTemplate(source, {"bos_token": "<s>"})
    assert template.render([{"role": "user", "content": "<é>"}]) == rendered


ENDLESS = {
    "loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}",
    "calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "depth": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS.keys())
def test_a_template_that_would_run_for_ever_is_ended(source: str) -> None:
    begin = time.monotonic()
    with pytest.raises(InvalidRequestError, match=r"too many steps|recursion"):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("source", ["{{ messages.append(1) }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}"])
def test_a_template_can_reach_nothing(source: str) -> None:
    with pytest.raises(InvalidRequestError):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])
