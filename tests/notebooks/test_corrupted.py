"""A file that is half, empty, in another encoding, of another type or too deep ends a command in one line that names
it, before anything is written; a broken file of another run stops nobody."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.conftest import Project

DEEP = b"[" * 100_000 + b"]" * 100_000
TEXT: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda old: b"",
    "half": lambda old: old[: len(old) // 2],
    "zeros": lambda old: bytes(len(old)),
    "utf-16": lambda old: old.decode().encode("utf-16"),
    "latin-1": lambda old: old[:-3] + "é".encode("latin-1") + old[-3:],
}
JSON = TEXT | {
    "mark": lambda old: b"\xef\xbb\xbf" + old,  # a byte-order mark, which transformers does not read
    "list": lambda old: b"[1]",
    "null": lambda old: b"null",
    "deep": lambda old: b'{"a": ' + DEEP + b"}",
}
WEIGHTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda old: b"",
    "half": lambda old: old[: len(old) // 2],
    "header only": lambda old: old[: 8 + int.from_bytes(old[:8], "little")],
    "longer": lambda old: old + b"\0",
    "zeros": lambda old: bytes(len(old)),
    "text": lambda old: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "flipped length": lambda old: old[:5] + b"\x01" + old[6:],
    "flipped brace": lambda old: old[:8] + b";" + old[9:],
    "flipped type": lambda old: old.replace(b'"F32"', b'"F36"', 1),
    "flipped name": lambda old: old.replace(b"_proj", b"_qroj", 1),
    "flipped shape": lambda old: re.sub(rb'"shape":\[(\d+),(?!\1)(\d+)\]', rb'"shape":[\2,\1]', old, count=1),
}
INDEX = JSON | {
    "names a missing shard": lambda old: old.replace(b"00002-of", b"00009-of"),
    "names a missing weight": lambda old: old.replace(b"up_proj", b"ux_proj", 1),
    "a number for a shard": lambda old: b'{"weight_map": {"a": 1}}',
    "no map": lambda old: b'{"metadata": {}}',
}
JINJA = {name: TEXT[name] for name in ("empty", "half", "utf-16", "latin-1")}
DEEPER = {"no model", "another type", "flipped name", "flipped shape"}  # only seen when the model is built
FILES: dict[str, dict[str, Callable[[bytes], bytes]]] = {
    "config.json": JSON | {"another type": lambda old: re.sub(rb'(?<="hidden_size": )\d+', b'"big"', old)},
    "generation_config.json": JSON,
    "tokenizer.json": JSON | {"no model": lambda old: b"{}"},
    "tokenizer_config.json": JSON,
    "chat_template.jinja": JINJA | {"unknown tag": lambda old: b"{% such %}" + old},
    "model.safetensors": WEIGHTS,
    "model.safetensors.index.json": INDEX,
    "model-00002-of-00002.safetensors": WEIGHTS,
    "adapter_config.json": JSON | {"another type": lambda old: old.replace(b'"LORA"', b'"LORE"')},
    "adapter_model.safetensors": WEIGHTS,
}
BASE = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "model.safetensors"]  # fmt: skip
SHARDED = ["model.safetensors.index.json", "model-00002-of-00002.safetensors"]
ADAPTER = ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
           "chat_template.jinja"]  # fmt: skip
SHORT = ["--train_rows", "8", "--eval_rows", "2", "--max_steps", "1", "--tuning", "lora", "--per_device_train_batch_size",
         "2", "--gradient_accumulation_steps", "1", "--max_length", "128"]  # fmt: skip
ASKED = ["--prompts", "What is 1 plus 2?", "--max_new_tokens", "4"]
# Which command reads which files of a BASE, of a SHARDED one or of an ADAPTER: FOLDER is a copy with a broken file.
PAIRS = ["02_dpo.py", "--model_id", "FOLDER", "--dataset_id", "preferences", *SHORT]
CHATS = ["01_sft.py", "--model_id", "FOLDER", "--dataset_id", "instructions", *SHORT]
MERGE = ["03_merge_push.py", "--adapter", "ADAPTER", "--base_model_id", "FOLDER"]
ANSWER = ["04_vibes.py", "--models", "FOLDER", *ASKED]
MODELS = [
    *((words, "BASE", BASE) for words in (CHATS, PAIRS, MERGE, ANSWER)),
    *((words, "SHARDED", SHARDED) for words in (CHATS, PAIRS, MERGE, ANSWER)),
    (["03_merge_push.py", "--adapter", "FOLDER"], "ADAPTER", ADAPTER),
    (ANSWER, "ADAPTER", ADAPTER),
]
QUICK = {("01_sft.py", "config.json", "latin-1"), ("02_dpo.py", "model.safetensors", "half"),
         ("03_merge_push.py", "adapter_model.safetensors", "flipped name"),
         ("04_vibes.py", "chat_template.jinja", "utf-16")}  # fmt: skip
CASES = [(words, kind, file, fault) for words, kind, files in MODELS for file in files for fault in FILES[file]]


@pytest.fixture(scope="module")
def models(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base in one file and in two, and an adapter on it."""
    from safetensors.numpy import load_file

    place = tmp_path_factory.mktemp("whole")
    base, sharded, adapter = place / "base", place / "sharded", place / "adapter"
    for folder in (base, sharded, adapter):
        shutil.copytree(demo_folder / "tiny-mistral", folder)
    weights = load_file(sharded / "model.safetensors")
    (sharded / "model.safetensors").unlink()
    shards: dict[str, dict[str, Any]] = {f"model-0000{i}-of-00002.safetensors": {} for i in (1, 2)}
    for i, name in enumerate(weights):
        shards[f"model-0000{1 + i % 2}-of-00002.safetensors"][name] = weights[name]
    for file, part in shards.items():
        save_file(part, sharded / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (adapter / name).unlink()
    config = json.loads((base / "config.json").read_text())
    size, layers = config["hidden_size"], config["num_hidden_layers"]
    q_proj = weights["model.layers.0.self_attn.q_proj.weight"]
    draw = np.random.default_rng(0)
    parts = {"A": (2, size), "B": (len(q_proj), 2)}
    lora = {f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{side}.weight":
            draw.normal(size=shape).astype("float32") for i in range(layers) for side, shape in parts.items()}  # fmt: skip
    save_file(lora, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(base)}))
    return {"BASE": base, "SHARDED": sharded, "ADAPTER": adapter}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but locks, which say nothing."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.suffix != ".lock"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def refused(project: Project, outputs: Path, words: list[str], name: str, writes: bool = False, **options: Any) -> str:
    """Run a command that has to end in one line which names a file, and to leave the outputs as they were."""
    outputs.mkdir(exist_ok=True)
    before = contents(outputs)
    script = [f"notebooks/{words[0]}", *words[1:], "--output_dir", str(outputs)] if words[0][0] == "0" else words
    done = project.python(*script, **options)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    assert done.returncode in (1, 2), f"status {done.returncode}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
    assert len(lines) == 1, done.stderr[-3000:]
    assert name in lines[0], lines[0]
    assert len(lines[0]) < 1000
    assert writes or contents(outputs) == before
    return lines[0]


@pytest.mark.parametrize(
    ("words", "kind", "file", "fault"),
    [
        pytest.param(*case, id="-".join([case[0][0][:2], *case[1:]]).replace(" ", "_"),
                     marks=[] if (case[0][0], *case[2:]) in QUICK else pytest.mark.long)
        for case in CASES
    ],
)  # fmt: skip
def test_a_broken_file_of_a_model_is_named_before_anything_is_written(
    words: list[str], kind: str, file: str, fault: str, project: Project, models: dict[str, Path], demo_folder: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    folder = Path(shutil.copytree(models[kind], tmp_path / "broken"))
    old = (folder / file).read_bytes()
    (folder / file).write_bytes(new := FILES[file][fault](old))
    assert new != old
    places = {name: str(path) for name, path in (models | {"FOLDER": folder}).items()}
    places |= {name: str(demo_folder / name) for name in ("instructions", "preferences")}
    name, writes = ("broken", words is ANSWER) if fault in DEEPER else (file, False)
    error = refused(project, tmp_path / "out", [places.get(word, word) for word in words], name, writes)
    assert "broken" in error
