"""The chat template of the built-in model, in the style of LLaVA: system message, several turns."""

CHAT_TEMPLATE = r"""{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {%- if message['content'] is string -%}
            {{- message['content'] + ' ' -}}
        {%- else -%}
            {%- for part in message['content'] if part['type'] == 'text' -%}
                {{- part['text'] + ' ' -}}
            {%- endfor -%}
        {%- endif -%}
    {%- elif message['role'] == 'user' -%}
        {{- 'USER: ' -}}
        {%- if message['content'] is string -%}
            {{- message['content'] + ' ' -}}
        {%- else -%}
            {%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>\n' -}}{%- endfor -%}
            {%- for part in message['content'] if part['type'] == 'text' -%}
                {{- part['text'] + ' ' -}}
            {%- endfor -%}
        {%- endif -%}
    {%- elif message['role'] == 'assistant' -%}
        {{- 'ASSISTANT: ' -}}
        {%- if message['content'] is string -%}
            {%- generation -%}{{- message['content'] + '</s>' -}}{%- endgeneration -%}
        {%- else -%}
            {%- for part in message['content'] if part['type'] == 'text' -%}
                {%- generation -%}{{- part['text'] -}}{%- endgeneration -%}
            {%- endfor -%}
            {%- generation -%}{{- '</s>' -}}{%- endgeneration -%}
        {%- endif -%}
    {%- else -%}
        {{- raise_exception('unknown role ' + message['role'] + '; use system, user or assistant') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""
