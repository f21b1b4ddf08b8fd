"""The chat templates of `data.chat` as the Jinja text that transformers and servers render."""

from __future__ import annotations

import json
import re

from hovle_jax.data.chat import Template
from hovle_jax.data.records import IMAGE_PLACEHOLDER

# Contents are strings or lists of {"type": "text", "text": ...} and {"type": "image", ...}. The
# loops stand where they are, and not in a macro, because vLLM looks for them to know that contents
# may be lists.
_TEMPLATE = """\
BOS{%- if SYSTEM and not (messages and messages[0]['role'] == 'system') -%}
  {{- SYSTEM_PREFIX ~ SYSTEM ~ SEPARATOR -}}
{%- endif -%}
{%- for message in messages -%}
  {%- set text -%}
    {%- if message['content'] is string -%}
      {{- message['content'] -}}
    {%- else -%}
      {%- set count = namespace(missing=0) -%}
      {%- for part in message['content'] -%}
        {%- if part['type'] in ('image', 'image_url') -%}
          {%- set count.missing = count.missing + 1 -%}
        {%- elif part['type'] == 'text' -%}
          {%- set count.missing = count.missing - part['text'].count(IMAGE) -%}
        {%- else -%}
          {{- raise_exception('parts are text or image, not ' ~ part['type']) -}}
        {%- endif -%}
      {%- endfor -%}
      {%- for part in message['content'] -%}
        {%- if part['type'] == 'text' -%}
          {{- part['text'] -}}
        {%- elif count.missing > 0 -%}
          {%- set count.missing = count.missing - 1 -%}
          {{- IMAGE ~ '\\n' -}}
        {%- endif -%}
      {%- endfor -%}
    {%- endif -%}
  {%- endset -%}
  {%- if message['role'] == 'user' -%}
    {{- USER_PREFIX ~ text ~ SEPARATOR -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- ASSISTANT_PREFIX ~ text ~ SEPARATOR -}}
  {%- elif message['role'] != 'system' or not loop.first -%}
    {{- raise_exception('no turn of the role ' ~ message['role'] ~ ' here') -}}
  {%- elif text -%}
    {{- SYSTEM_PREFIX ~ text ~ SEPARATOR -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- ASSISTANT_PREFIX -}}
{%- endif -%}"""


def chat_template(template: Template, system: str | None = None, *, bos: bool = False) -> str:
    """Jinja text that renders conversations as `data.chat` does, images as '<image>'.

    An image of a content list becomes '<image>' and a newline in its place, unless the message's
    text places it itself; of several, those that the text does not place come first, as in
    `chat.first_question`. Roles other than user and assistant, and a system turn that is not the
    first, are errors.

    Args:
      template: The chat template.
      system: As in `encode_conversation`: in place of the template's default; '' for none.
      bos: Begin with the tokenizer's `bos_token`, for callers that encode rendered chats without
        special tokens (the tokenizer's own apply_chat_template, OpenAI-style servers). The
        processor adds it only where it is missing.
    """
    values = {
        "SYSTEM_PREFIX": _literal(template.system_prefix),
        "SYSTEM": _literal(template.system_message if system is None else system),
        "USER_PREFIX": _literal(template.user_prefix),
        "ASSISTANT_PREFIX": _literal(template.assistant_prefix),
        "SEPARATOR": _literal(template.separator),
        "IMAGE": _literal(IMAGE_PLACEHOLDER),
        "BOS": "{{- bos_token -}}\n" if bos else "",
    }
    # Capital names occur nowhere else in the template; one pass leaves inserted text alone.
    return re.sub(r"\b[A-Z_]+\b", lambda match: values[match[0]], _TEMPLATE)


def _literal(text: str) -> str:
    """A Jinja string; its escapes are those of JSON."""
    return json.dumps(text, ensure_ascii=False)
