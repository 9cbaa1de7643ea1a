"""Chat templates by name, for models that have none. Each ends an answer with the end-of-sequence token."""

# What a format adds to a tokenizer that lacks it: new tokens, and the one that ends an answer.
TOKENS = {"chatml": ("<|im_start|>", "<|im_end|>")}
ENDS = {"chatml": "<|im_end|>"}

_ALTERNATE = (
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{- raise_exception('roles must alternate user/assistant/user/assistant/...') -}}"
    "{%- endif -%}"
)
# A system message that a format has no place for opens the first user turn.
_SYSTEM_FIRST = (
    "{%- set system = messages[0]['content'] + '\\n\\n' if messages and messages[0]['role'] == 'system' else '' -%}"
    "{{- bos_token -}}"
    "{%- for message in (messages[1:] if system else messages) -%}" + _ALTERNATE
)

# Mistral-7B-Instruct v0.1 and v0.2
MISTRAL = (
    _SYSTEM_FIRST + "{%- if message['role'] == 'user' -%}"
    "{{- ' [INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' -}}"
    "{%- else -%}"
    "{{- ' ' + message['content'] + eos_token -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
)

# OpenAI's ChatML, as Qwen, Yi and many others have it
CHATML = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' -}}"
    "{{- '\\n' if not loop.last or message['role'] != 'assistant' else '' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

# allenai/tulu-2 and Zephyr's kin
TULU = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>\\n' + message['content'] -}}"
    "{{- eos_token if message['role'] == 'assistant' else '' -}}"
    "{{- '\\n' if not loop.last or message['role'] != 'assistant' else '' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"
)

# Stanford Alpaca's headings, without its preamble
ALPACA = (
    _SYSTEM_FIRST + "{%- if message['role'] == 'user' -%}"
    "{{- '### Instruction:\\n' + (system if loop.first else '') + message['content'] + '\\n\\n### Response:\\n' -}}"
    "{%- else -%}"
    "{{- message['content'] + eos_token + ('' if loop.last else '\\n\\n') -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
)

# lmsys/vicuna v1.1 and later
VICUNA = (
    _SYSTEM_FIRST + "{%- if message['role'] == 'user' -%}"
    "{{- 'USER: ' + (system if loop.first else '') + message['content'] + ' ASSISTANT:' -}}"
    "{%- else -%}"
    "{{- ' ' + message['content'] + eos_token -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
)

# Anthropic/hh-rlhf, the form that Pythia was aligned in
HH = (
    _SYSTEM_FIRST + "{%- if message['role'] == 'user' -%}"
    "{{- '\\n\\nHuman: ' + (system if loop.first else '') + message['content'] + '\\n\\nAssistant:' -}}"
    "{%- else -%}"
    "{{- ' ' + message['content'] + eos_token -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
)

FORMATS = {"mistral": MISTRAL, "chatml": CHATML, "tulu": TULU, "alpaca": ALPACA, "vicuna": VICUNA, "hh": HH}
