"""Chat templates render as in the libraries they were written for, and cannot do harm."""

from __future__ import annotations

import hashlib
import re

import pytest

from tandem.errors import ConfigError, InvalidRequest
from tandem.gateway.chat_template import ChatTemplates

USER = [{"role": "user", "content": "hi <b>"}]


def render(template: str, messages: list[dict[str, str]] = USER, **options: object) -> str:
    return ChatTemplates({"default": template}, {"bos_token": "<s>"}).render(messages, **options)  # type: ignore[arg-type]


def test_whitespace_variables_and_loop_controls() -> None:
    template = """{{ bos_token }}
{% for message in messages %}
    {% if loop.index > 1 %}{% break %}{% endif %}
{{ message.role }}: {{ message['content'] | trim }}
{% endfor %}
{% if add_generation_prompt %}go{% endif %}"""
    assert render(template, [*USER, *USER]) == "<s>\nuser: hi <b>\ngo"


def test_tojson_does_not_escape() -> None:
    assert render("{{ messages | tojson }}") == '[{"role": "user", "content": "hi <b>"}]'
    assert render("{{ {'é': 1} | tojson(indent=1) }}") == '{\n "é": 1\n}'


def test_generation_marks_are_transparent_and_time_is_there() -> None:
    assert render("{% generation %}x{% endgeneration %}") == "x"
    assert re.fullmatch(r"\d{4}", render("{{ strftime_now('%Y') }}"))


def test_named_templates_and_arguments() -> None:
    templates = ChatTemplates({"default": "plain {{ mood }}", "tool_use": "tools {{ tools[0].name }}"}, {})
    assert templates.render(USER, arguments={"mood": "good"}) == "plain good"
    assert templates.render(USER, tools=[{"name": "t"}]) == "tools t"
    assert ChatTemplates({"default": "only"}, {}).render(USER, tools=[{"name": "t"}]) == "only"
    assert templates.sha256 == hashlib.sha256(b"plain {{ mood }}").hexdigest()
    with pytest.raises(InvalidRequest, match="tools"):
        templates.render(USER, arguments={"tools": []})


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{{ messages[7].content }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
    ],
)
def test_what_goes_wrong_is_the_requests_fault(template: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        render(template)
    assert caught.value.field == "messages"


def test_the_final_message_can_be_continued() -> None:
    template = (
        "{% for m in messages %}<{{ m.content | trim }}></turn>{% endfor %}{% if add_generation_prompt %}!{% endif %}"
    )
    messages = [*USER, {"role": "assistant", "content": " so far "}]
    assert render(template, messages, continue_final_message=True) == "<hi <b>></turn><so far"
    with pytest.raises(InvalidRequest):
        render("nothing", messages, continue_final_message=True)


def test_a_broken_template_is_found_at_the_start() -> None:
    with pytest.raises(ConfigError, match="line 1"):
        ChatTemplates({"default": "{% if %}"}, {})
    with pytest.raises(InvalidRequest, match="no chat template"):
        ChatTemplates({}, {}).render(USER)
