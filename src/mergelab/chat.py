"""Chat templates of merged models: chosen among the inputs, by name, or given as Jinja text.

The named ones write prompts as their format's publisher describes them: chatml (OpenAI), alpaca
(Stanford), llama3 (Meta), mistral (mistral-common, V1), exaone (LG AI Research)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mergelab.checkpoint import Checkpoint
from mergelab.errors import UserError, nearest
from mergelab.tokens import CONFIG, dump, load
from mergelab.yamlfile import Map, Reader

FILE, OLD = "chat_template.jinja", "chat_template.json"
SHORTEST = 20  # characters of a template
CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
ALPACA = (
    "{%- set names = {'user': 'Instruction', 'user_context': 'Input', 'assistant': 'Response'} %}"
    "{%- for message in messages %}"
    "{%- if message['role'] in names %}{{- '### ' + names[message['role']] + ':\\n' }}{%- endif %}"
    "{{- message['content'] | trim + '\\n\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '### Response:\\n' }}{%- endif %}"
)
LLAMA3 = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
MISTRAL = (
    "{{- bos_token }}"
    "{%- set first = namespace(system='') %}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'system' %}{%- set first.system = message['content'] + '\\n\\n' %}"
    "{%- elif message['role'] == 'user' %}"
    "{{- ' [INST] ' + first.system + message['content'] + ' [/INST]' }}"
    "{%- set first.system = '' %}"
    "{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] + eos_token }}"
    "{%- else %}{{- raise_exception('roles are system, user and assistant') }}{%- endif %}"
    "{%- endfor %}"
)
EXAONE = (
    "{%- if messages and messages[0]['role'] != 'system' %}"
    "{{- '[|system|][|endofturn|]\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '[|' + message['role'] + '|]' + message['content'] }}"
    "{{- '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '[|assistant|]' }}{%- endif %}"
)
TEMPLATES = {
    "alpaca": ALPACA,
    "chatml": CHATML,
    "exaone": EXAONE,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
}


def read_chat_template(reader: Reader, top: Map) -> str | None:
    """A recipe's `chat_template`: 'auto', a known name, or Jinja text; None where there is none."""
    value = reader.text(top, "chat_template", None)
    if not value or value == "auto" or value in TEMPLATES:
        return value or None
    if "{" not in value or len(value) < SHORTEST:
        known = ("auto", *TEMPLATES)
        reader.wrong(
            top.lines["chat_template"],
            f"there is no chat template '{value[:40]}'.{nearest(value, known)}\n"
            f"  Names: {', '.join(known)}; or give the Jinja text of a template.",
        )
        return None
    return str(value)


def chosen_template(setting: str, models: Iterable[Checkpoint]) -> str | None:
    """The text of a template; 'auto' takes the most frequent one of the models, None without.

    Of several as frequent ones, the one of the model that comes first."""
    if setting != "auto":
        return TEMPLATES.get(setting, setting)
    found = [template for model in models if (template := template_of(model))]
    return Counter(found).most_common(1)[0][0] if found else None


def template_of(model: Checkpoint) -> str | None:
    """A model's own template without surrounding white space; the default one of several."""
    if model.file:
        return None
    path = model.folder / FILE
    try:
        if path.is_file():
            return path.read_text("utf-8").strip() or None
        for name in (CONFIG, OLD):
            if (model.folder / name).is_file():
                facts = load((model.folder / name).read_bytes(), model.folder / name)
                if template := _default(facts.get("chat_template")):
                    return template
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"model {model.label}: its chat template cannot be read: {error}") from None
    return None


def _default(template: Any) -> str | None:
    if isinstance(template, list):  # [{name, template}, ...]
        named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[0].get("template") if named else None
    return template.strip() if isinstance(template, str) else None


def with_template(files: Mapping[str, bytes], template: str) -> dict[str, bytes]:
    """Tokenizer files that carry `template`: as chat_template.jinja, and in tokenizer_config.json
    for loaders that do not know that file."""
    changed = {name: data for name, data in files.items() if name != OLD}
    changed[FILE] = template.encode("utf-8", "replace")
    if CONFIG in files:
        facts = load(files[CONFIG], Path(CONFIG))
        changed[CONFIG] = dump({**facts, "chat_template": template})
    return changed
