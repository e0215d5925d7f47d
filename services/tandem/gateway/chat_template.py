"""Chat templates: messages to one prompt text, rendered by Jinja in its immutable sandbox.

The environment is the one that published templates are written for: trimmed blocks, loop controls, `raise_exception`,
`strftime_now`, an unescaped `tojson`, and `{% generation %}` blocks, which only mark what they contain.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tandem.errors import ConfigError, InvalidRequest

_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: trainers mask by it, here it is its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplates:
    """A model's templates by name. `special_tokens` (bos_token, ...) are variables of every template."""

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._special_tokens = dict(special_tokens)
        try:
            self._templates = {name: environment.from_string(text) for name, text in templates.items()}
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"the model's chat template cannot be read: line {error.lineno}: {error}") from error
        default = templates.get("default", "")
        self.sha256 = hashlib.sha256(default.encode()).hexdigest() if default else ""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        arguments: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> str:
        """Return the prompt; raises InvalidRequest if there is no template or it refuses the messages."""
        template = self._templates.get("tool_use" if tools else "default") or self._templates.get("default")
        if template is None:
            raise InvalidRequest("this model has no chat template", field="messages", reason="UNSUPPORTED")
        arguments = dict(arguments or {})
        if reserved := _RESERVED & arguments.keys():
            raise InvalidRequest(f"{min(reserved)} cannot be set here", field="chat_template_kwargs")
        variables = self._special_tokens | arguments
        variables |= {"messages": messages, "tools": list(tools) or None, "documents": None}
        try:
            text = template.render(**variables, add_generation_prompt=not continue_final_message)
        except Exception as error:  # templates index, add and call whatever the messages have
            raise InvalidRequest(f"the chat template refuses these messages: {error}", field="messages") from error
        return _cut_after(text, messages[-1]) if continue_final_message else text


def _cut_after(text: str, message: Mapping[str, Any]) -> str:
    """Return `text` up to the end of the last message's content: without the turn's closing marks."""
    content = str(message.get("content") or "")
    for candidate in (content, content.strip()):
        position = text.rfind(candidate) if candidate else -1
        if position >= 0:
            return text[: position + len(candidate)]
    raise InvalidRequest("the last message has no content to continue", field="continue_final_message")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
