"""The prompt layout as a Jinja chat template, for programs that know a checkpoint by its ``chat_template.jinja`` alone.

Written from the fields of ``prompts.Template``; a test compares it with ``prompt_layout`` on every template.
"""

from __future__ import annotations

from functools import cache

from tinygptv.data.prompts import IMAGE_PLACEHOLDER, Template

_GROUP_MESSAGES = """
{%- set NO_QUESTION = {'role': 'user', 'texts': [], 'images': 0} -%}
{%- set chat = namespace(turns=[], system=[]) -%}
{%- for message in messages -%}
  {%- set found = namespace(texts=[], images=0) -%}
  {%- if message['content'] is string -%}
    {%- set found.texts = [message['content']] -%}
  {%- else -%}
    {%- for part in message['content'] or [] -%}
      {%- if part['type'] == 'text' -%}
        {%- set found.texts = found.texts + [part['text']] -%}
      {%- elif part['type'] in ['image', 'image_url'] -%}
        {%- set found.images = found.images + 1 -%}
      {%- else -%}
        {{- raise_exception('a message has a part of type ' ~ part['type'] ~ '; types are text and image.') -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- set role = message['role'] -%}
  {%- if role not in ['system', 'developer', 'user', 'assistant'] -%}
    {{- raise_exception('a message has the role ' ~ role ~ '; roles are system, developer, user, assistant.') -}}
  {%- elif found.images and role != 'user' -%}
    {{- raise_exception('a message of the ' ~ role ~ ' holds an image; only the user sends images.') -}}
  {%- elif role in ['system', 'developer'] -%}
    {%- set chat.system = chat.system + found.texts -%}
  {%- elif chat.turns and chat.turns[-1]['role'] == role -%}
    {%- set last = chat.turns[-1] -%}
    {%- set joined = {'role': role, 'texts': last['texts'] + found.texts, 'images': last['images'] + found.images} -%}
    {%- set chat.turns = chat.turns[:-1] + [joined] -%}
  {%- else -%}
    {%- set chat.turns = chat.turns + [{'role': role, 'texts': found.texts, 'images': found.images}] -%}
  {%- endif -%}
{%- endfor -%}
{%- if messages and (not chat.turns or chat.turns[0]['role'] != 'user') -%}
  {%- set chat.turns = [NO_QUESTION] + chat.turns -%}
{%- endif -%}
{%- if add_generation_prompt and chat.turns and chat.turns[-1]['role'] != 'user' -%}
  {%- set chat.turns = chat.turns + [NO_QUESTION] -%}
{%- endif -%}
"""

_WRITE_TURNS = """
{%- set seen = namespace(images=0) -%}
{%- for turn in chat.turns -%}
  {%- set texts = chat.system + turn['texts'] if loop.first else turn['texts'] -%}
  {%- set words = namespace(text=texts | select | join('\\n')) -%}
  {%- for marker in [PLACEHOLDER, bos_token, eos_token, pad_token, unk_token] if marker -%}
    {%- set words.text = words.text | replace(marker, marker[0] ~ ' ' ~ marker[1:]) -%}
  {%- endfor -%}
  {%- if turn['role'] == 'assistant' -%}
    {%- generation -%}
      {{- words.text | replace(END, END_APART) | replace(END, END_APART) ~ END -}}
    {%- endgeneration -%}
  {%- else -%}
    {%- set seen.images = seen.images + turn['images'] -%}
    {{- BOS ~ (OPENING if loop.first else '') ~ BEFORE -}}
    {%- for _ in range(turn['images']) -%}{{- IMAGE -}}{%- endfor -%}
    {{- words.text ~ (AFTER_INSTRUCTION if seen.images else '') ~ AFTER -}}
  {%- endif -%}
{%- endfor -%}
"""


@cache
def jinja_template(template: Template) -> str:
    """The Jinja source that lays conversations out as ``prompt_layout`` does."""
    before, after = template.turn.split("{}")
    constants = {
        "PLACEHOLDER": IMAGE_PLACEHOLDER,
        "END": template.end_symbol,
        "END_APART": template.end_symbol_apart,
        "OPENING": template.opening,
        "BEFORE": before,
        "IMAGE": template.image,
        "AFTER_INSTRUCTION": template.after_instruction,
        "AFTER": after,
    }
    settings = "".join(f"{{%- set {name} = {value!r} -%}}" for name, value in constants.items())
    settings += f"{{%- set BOS = {'bos_token' if template.bos else repr('')} -%}}"
    lines = (settings + _GROUP_MESSAGES + _WRITE_TURNS).splitlines()
    return "".join(line.strip() for line in lines)
