"""Tokenizer and chat template, compared with transformers'."""

import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from gateway.text.chat_template import ChatTemplate
from gateway.text.template_source import Message
from gateway.text.tokenizer import KNOWN_FILES, ModelTokenizer
from kvrelay.errors import InvalidRequestError, NoChatTemplateError, PreconditionError
from tests.support.small_tokenizer import tokenizer_files
from tests.support.tiny_models import save_tiny_tokenizer

TEXTS = ["Hello, world!", "  two  spaces\n\n", "日本語 and 🎉", "<|im_start|>user", "a" * 5000]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 1 < 2 & 'x'?"},
    {"role": "assistant", "content": "True."},
    {"role": "user", "content": "Sure? 🎉"},
]


def render(tokenizer: ModelTokenizer, messages: Sequence[Message]) -> str:
    """In this process; gateways do so in a child."""
    template = tokenizer.require_template()
    return ChatTemplate(template.source, dict(template.special_tokens)).render(messages)


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name in KNOWN_FILES}


@pytest.mark.parametrize("texts", [TEXTS])
def test_tokens_and_rendered_chats_equal_those_of_transformers(texts: Sequence[str], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_tiny_tokenizer(tmp_path)
    ours, theirs = ModelTokenizer(read_files(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    for text in texts:
        ids = ours.encode(text, 10_000).token_ids
        assert ids is not None
        assert ids == theirs(text)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    rendered = render(ours, CHAT)
    assert rendered == theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert (
        ours.encode(rendered, 10_000, rendered=True).token_ids
        == theirs(rendered, add_special_tokens=False)["input_ids"]
    )


def test_a_model_without_a_template_takes_no_chat() -> None:
    tokenizer = ModelTokenizer(tokenizer_files(chat_template=None))
    assert tokenizer.template is None
    with pytest.raises(NoChatTemplateError):
        tokenizer.require_template()


def test_messages_that_the_template_refuses_are_the_clients_mistake() -> None:
    with pytest.raises(InvalidRequestError, match="role wizard is unknown"):
        render(ModelTokenizer(tokenizer_files()), [{"role": "wizard", "content": "x"}])


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_file_is_named(name: str) -> None:
    with pytest.raises(PreconditionError, match=name):
        ModelTokenizer({**tokenizer_files(), name: b"{"})


def test_a_broken_template_is_a_precondition() -> None:
    with pytest.raises(PreconditionError, match="template"):
        ChatTemplate("{% for %}", {})


@pytest.mark.parametrize(
    "source",
    ["{% unheard %}x{% endunheard %}", "{{ 1 | unheard }}", "{% for %}", "{% for x in y %}" * 30 + "{% endfor %}" * 30],
    ids=["tag", "filter", "syntax", "depth"],
)
def test_a_template_that_does_not_compile_does_not_stop_plain_text(source: str) -> None:
    tokenizer = ModelTokenizer(tokenizer_files(chat_template=source))
    token_ids = tokenizer.encode("Hello", 100).token_ids
    assert token_ids is not None
    assert tokenizer.decode(token_ids) == "Hello"
    with pytest.raises(PreconditionError, match=r"chat template is broken: .*; send text instead"):
        render(tokenizer, CHAT)


def test_a_broken_template_file_does_not_stop_plain_text() -> None:
    tokenizer = ModelTokenizer({**tokenizer_files(chat_template=None), "chat_template.json": b"{"})
    assert tokenizer.encode("Hello", 100).num_tokens == 5
    with pytest.raises(PreconditionError, match=r"chat_template\.json"):
        tokenizer.require_template()


TRAINING_TEMPLATE = """{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
    {%- set before = '[' -%}
    {% generation %}{% set before = '(' %}{{ before + message.content }}
        {%- for x in 'ab' -%}{{ x }}{%- endfor -%}{% endgeneration %}
    {{- before }}
{%- else -%}{{ dict(a=message.role).a + message.content }}{%- endif -%}
{%- set space = namespace(count=1) -%}{%- set space.count = space.count + 1 -%}{{ space.count }}
{% endfor %}"""


def test_a_template_that_marks_the_assistants_words_renders_as_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_tiny_tokenizer(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    theirs.chat_template = TRAINING_TEMPLATE
    rendered = ChatTemplate(TRAINING_TEMPLATE, {}).render(CHAT)
    assert rendered == theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert "(True.ab[" in rendered


def test_a_loop_within_a_marked_block_is_counted() -> None:
    endless = "{% generation %}" + ENDLESS["loops"] + "{% endgeneration %}"
    with pytest.raises(InvalidRequestError, match="too many steps"):
        ChatTemplate(endless, {}).render(CHAT)


def test_the_template_among_the_tokenizers_settings_is_found() -> None:
    files = tokenizer_files(chat_template=None)
    files["tokenizer_config.json"] = (
        b'{"bos_token": {"content": "<s>"}, "chat_template": "{{ bos_token }}{{ messages[0].content }}"}'
    )
    assert render(ModelTokenizer(files), [{"role": "user", "content": "hi"}]) == "<s>hi"


@pytest.mark.parametrize(
    ("source", "rendered"),
    [
        ("{{ messages | tojson }}", '[{"role": "user", "content": "<é>"}]'),
        ("{% for m in messages %}{% if loop.first %}{% break %}{% endif %}{% endfor %}x", "x"),
        ("{% if true %}\n    y\n{% endif %}", "    y\n"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        (
            "{% for x in [1, 2, 3] if x > 1 %}{{ loop.index }}/{{ loop.length }}{{ loop.last }} {% endfor %}",
            "1/2False 2/2True ",
        ),
        ("{% for x in [[1], [2]] recursive %}{{ x if x is number else loop(x) }}{% else %}none{% endfor %}", "12"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}", "a1"),
        ("{% if tools %}t{% endif %}{{ bos_token }}", "<s>"),
    ],
)
def test_templates_get_the_functions_that_transformers_gives(source: str, rendered: str) -> None:
    template = ChatTemplate(source, {"bos_token": "<s>"})
    assert template.render([{"role": "user", "content": "<é>"}]) == rendered


ENDLESS = {
    "loops": "{% for a in range(9999) %}" * 3 + "{% endfor %}" * 3,
    "calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "depth": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS.keys())
def test_an_endless_template_is_stopped(source: str) -> None:
    begin = time.thread_time()
    with pytest.raises(InvalidRequestError, match=r"too many steps|recursion"):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])
    assert time.thread_time() - begin < 20


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ namespace(_x=1) }}",
        "{{ dict.mro() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(source: str) -> None:
    with pytest.raises(InvalidRequestError):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ 9 ** (9 ** 9) }}",
        "{{ (9 ** 99) ** 99 }}",
        "{% set x = 9 ** 999 %}{{ x * x * x * x }}",
        "{{ 'a' * 3000000000 }}",
        "{{ 3000000000 * ['a'] }}",
        "{{ messages * 1000000 }}",
    ],
)
def test_a_template_multiplies_nothing_large(source: str) -> None:
    template = ChatTemplate(source, {})  # which does not fold it either
    with pytest.raises(InvalidRequestError, match="values that are too large"):
        template.render([{"role": "user", "content": "x"}])


def test_a_template_still_multiplies_what_is_small() -> None:
    source = "{{ '-' * 3 }}{{ 2 ** 10 }}{{ 3 * 4 }}{{ 2 ** 0.5 > 1 }}{{ 2 ** -1 }}{{ 1.5 * 2 }}"
    assert ChatTemplate(source, {}).render([]) == "---102412True0.53.0"


def test_a_template_has_no_words_of_its_own() -> None:
    with pytest.raises(InvalidRequestError, match="lipsum"):
        ChatTemplate("{{ lipsum(n=200000) }}", {}).render([])
