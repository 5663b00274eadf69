"""Chat templates that an operator may choose by name if a model has none or a wrong one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

_CHATML = r"""{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

_HERMES = r"""{%- macro turn(role, content) %}
{{- '<|im_start|>' + role + '\n' + content + '<|im_end|>\n' }}
{%- endmacro %}
{%- set has_system = messages[0].role == 'system' %}
{%- set system = messages[0].content if has_system else '' %}
{%- if tools %}
{%- set listed = '# Tools\n\nYou can call functions to help with the user\'s request. Their '
    'signatures are listed between the <tools></tools> tags:\n<tools>\n'
    ~ tools | map('tojson') | join('\n') ~ '\n</tools>\n\n'
    'For each call, write a JSON object with the function\'s name and arguments '
    'between <tool_call></tool_call> tags:\n<tool_call>\n'
    '{"name": <name>, "arguments": <arguments>}\n</tool_call>' %}
{{- turn('system', system + '\n\n' + listed if system else listed) }}
{%- elif has_system %}
{{- turn('system', system) }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
{{- '<|im_start|>user' }}
{%- endif %}
{{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
{{- '<|im_end|>\n' }}
{%- endif %}
{%- elif message.tool_calls %}
{{- '<|im_start|>assistant\n' + message.content }}
{%- for call in message.tool_calls %}
{{- '\n' if message.content or not loop.first }}
{{- '<tool_call>\n{"name": ' + call.function.name | tojson + ', "arguments": ' }}
{{- call.function.arguments | tojson + '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- elif not (loop.first and has_system) %}
{{- turn(message.role, message.content) }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

_LLAMA3 = r"""{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
{{- message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""

#: Llama 2's and Mistral's: `[INST]` around the user's text, the system message within the first.
_INST = r"""{{- bos_token }}
{%- set has_system = messages[0].role == 'system' %}
{%- set system = BEFORE + messages[0].content | trim + BEHIND if has_system else '' %}
{%- for message in (messages[1:] if has_system else messages) %}
{%- if message.role == 'user' %}
{{- ('' if loop.first else FIRST) + '[INST] ' + (system if loop.first else '') }}
{{- message.content | trim + ' [/INST]' }}
{%- elif message.role == 'assistant' %}
{{- ' ' + message.content | trim ~ EOS }}
{%- else %}
{{- raise_exception('only a first message of the system, and user and assistant, can be shown') }}
{%- endif %}
{%- endfor %}"""
_LLAMA2 = (
    _INST.replace("BEFORE", r"'<<SYS>>\n'")
    .replace("BEHIND", r"'\n<</SYS>>\n\n'")
    .replace("FIRST", "bos_token")
    .replace("EOS", "' ' ~ eos_token")
)
_MISTRAL = (
    _INST.replace("BEFORE", "''")
    .replace("BEHIND", r"'\n\n'")
    .replace("FIRST", "''")
    .replace("EOS", "eos_token")
)

_GEMMA = r"""{{- bos_token }}
{%- set has_system = messages[0].role == 'system' %}
{%- for message in (messages[1:] if has_system else messages) %}
{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}
{{- messages[0].content + '\n\n' if has_system and loop.first }}
{{- message.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

_ZEPHYR = r"""{%- for message in messages %}
{{- '<|' + message.role + '|>\n' + message.content ~ eos_token ~ '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""

NAMED_TEMPLATES: Mapping[str, str] = {
    "chatml": _CHATML,
    "gemma": _GEMMA,
    "hermes": _HERMES,
    "llama2": _LLAMA2,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
    "zephyr": _ZEPHYR,
}


def chosen_template(chosen: str) -> str:
    """Return the source of the template in a file or of a built-in name. Raises `ValueError`."""
    if chosen in NAMED_TEMPLATES:
        return NAMED_TEMPLATES[chosen]
    names = ", ".join(NAMED_TEMPLATES)
    try:
        return Path(chosen).read_text(encoding="utf-8")
    except FileNotFoundError:
        message = f"is neither a file nor the name of a built-in template ({names})"
    except (OSError, UnicodeDecodeError) as error:
        message = f"cannot be read: {error}"
    raise ValueError(f"chat_template: {chosen!r} {message}")
