"""A template as Jinja, so that plain transformers writes what training wrote. Pure text; trainer/data/rendering.py is the other writer.

A test holds the two together.
"""

from trainer.data.templates import Template, filled, parts_of


def to_jinja(template: Template) -> str:
    """The template for `apply_chat_template`; `generation` blocks mark what is learned, for who asks transformers for that mask."""
    content = "message['content'] | trim" if template.strip else "message['content']"
    system = _expression(template.system, content=content) if template.system is not None else None
    lines = [
        f"{{{{- {_quoted(template.begin)} }}}}" if template.begin else "",
        *_jinja_defaults(template, system),
        "{%- for message in messages %}",
        "{%- if message['role'] == 'system' %}",
        f"{{{{- {system} }}}}" if system else "",
        "{%- elif message['role'] == 'user' %}",
        *_jinja_user(template, content),
        *(
            ["{%- elif message['role'] == 'tool' %}", f"{{{{- {_expression(template.tool, content=content)} }}}}"]
            if template.tool
            else []
        ),
        "{%- elif message['role'] == 'assistant' %}",
        f"{{{{- {_quoted(template.reply)} }}}}" if template.reply else "",
        f"{{%- generation %}}{{{{- {_expression(template.answer, content=content)} }}}}{{%- endgeneration %}}",
        f"{{{{- {_quoted(template.after)} }}}}" if template.after else "",
        "{%- else %}",
        "{{- raise_exception('a turn must be of system, user, assistant or tool, not ' + message['role']) }}",
        "{%- endif %}",
        "{%- endfor %}",
        f"{{%- if add_generation_prompt %}}{{{{- {_quoted(template.reply)} }}}}{{%- endif %}}"
        if template.reply
        else "",
    ]
    return "\n".join(filter(None, lines))


def with_system(jinja: str, system: str | None) -> str:
    """Any chat template, with a system text for conversations without one; None leaves it as it is."""
    if system is None:
        return jinja
    turn = f"{{'role': 'system', 'content': {_quoted(system)}}}"
    return (
        f"{{%- if messages[0]['role'] != 'system' %}}{{%- set messages = [{turn}] + messages %}}{{%- endif %}}{jinja}"
    )


def _jinja_defaults(template: Template, system: str | None) -> list[str]:
    """The default system text, before the first turn."""
    if template.default_system is None or template.system is None:
        return []
    plain = _quoted(filled(template.system, content=template.default_system))
    lines = ["{%- if messages and messages[0]['role'] == 'user' %}"]
    if template.default_system_with_input is not None:
        with_input = _quoted(filled(template.system, content=template.default_system_with_input))
        lines += [f"{{{{- {with_input} if messages[0]['input'] else {plain} }}}}"]
    else:
        lines += [f"{{{{- {plain} }}}}"]
    return [*lines, "{%- endif %}"]


def _jinja_user(template: Template, content: str) -> list[str]:
    """A user turn, with the system text or the input that it carries."""
    joined = f"(({content}) + ('\\n\\n' + message['input'] if message['input'] else ''))"
    lines = [f"{{{{- {_expression(template.user, content=joined)} }}}}"]
    if template.user_with_input is not None:
        with_input = _expression(template.user_with_input, content=content, input="message['input']")
        lines = ["{%- if message['input'] %}", f"{{{{- {with_input} }}}}", "{%- else %}", *lines, "{%- endif %}"]
    if template.first_user is not None:
        system = "messages[0]['content'] | trim" if template.strip else "messages[0]['content']"
        first = _expression(template.first_user, content=joined, system=f"({system})")
        test = "{%- if loop.index0 == 1 and messages[0]['role'] == 'system' %}"
        lines = [test, f"{{{{- {first} }}}}", "{%- else %}", *lines, "{%- endif %}"]
    return lines


def _expression(piece: str, **expressions: str) -> str:
    """A Jinja expression for a piece: its literals, with expressions in place of {content} and the like."""
    parts = (f"({expressions[part]})" if is_name else _quoted(part) for part, is_name in parts_of(piece))
    return " ~ ".join(parts)


def _quoted(text: str) -> str:
    """A literal for Jinja."""
    escaped = (
        text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    )
    return f"'{escaped}'"
