"""A file that is half, empty, in another encoding, of another type or too deep ends a command in one line that names
it, before anything is written; a broken file of another run stops nobody."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.conftest import Project, marks

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
SHORT = ["--train_rows", "8", "--eval_rows", "2", "--max_steps", "1", "--tuning", "lora", "--max_length", "128",
         "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1"]  # fmt: skip
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
CASES = [
    (words, kind, file, fault)
    for words, kind, files in MODELS
    for file in files
    for fault in FILES[file]
    if (words, fault) != (MERGE, "no model")  # the adapter's own tokenizer is used
]


def is_long(words: list[str], kind: str, file: str, fault: str) -> bool:
    """Every fault of every file, for every second notebook that reads it: they load models alike."""
    return (int(words[0][:2]) + list(FILES[file]).index(fault)) % 2 == 0


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
    lora = {
        f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{side}.weight": draw.normal(size=shape)
        for i in range(layers)
        for side, shape in parts.items()
    }
    lora = {name: weight.astype("float32") for name, weight in lora.items()}
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
                     marks=marks((case[0][0], *case[2:]) in QUICK, is_long(*case)))
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


ROWS = [{"prompt": f"What is {i} plus 1?", "chosen": f"It is {i + 1}.", "rejected": "No."} for i in range(12)]
QUESTIONS = [{"question_id": i, "category": "general", "turns": [f"What is {i} plus 1?"]} for i in (1, 2)]
ASKED_RUN = {"step": "vibes", "status": "finished", "models": ["a", "b"], "page": "p"}
PROMPT = {"name": "pair", "system_prompt": "Judge.", "prompt_template": "{question} {answer_a} {answer_b}"}
VOTE = {"question_id": 1, "order": ["a", "b"], "winner": "a"}
VOTES = {"format": "votes-1", "page": "p", "voter": "x", "votes": [VOTE]}
JUDGMENT = {"question_id": 1, "model_1": "a", "model_2": "b", "g1_winner": "tie", "g2_winner": "tie", "turn": 1,
            "judge": ["j", "p"]}  # fmt: skip
RULES = """
import dataclasses

@dataclasses.dataclass
class Score:
    good: bool

def score(answer, question):
    return Score(True)

def compare(first, second, question):
    return "win"
"""
NOTEBOOK = """# %% tags=["parameters"]
from dataclasses import dataclass
from helpers.settings import TrainSettings

@dataclass
class Settings(TrainSettings):
    step = "dpo"
    dpo_beta: float = 0.1  # beta
"""


def jsonl(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def answers(name: str) -> str:
    return jsonl(
        *({"question_id": i, "model_id": name, "choices": [{"index": 0, "turns": [f"{name} {i}"]}]} for i in (1, 2))
    )


def write_world(folder: Path) -> None:
    """One whole file of every kind that a command reads, but of models."""
    texts = {
        "pairs.jsonl": jsonl(*ROWS), "pairs.json": json.dumps(ROWS), "pairs.csv": table(","), "pairs.tsv": table("\t"),
        "recipe.yaml": "dpo:\n  dpo_beta: 0.2\n  lora_r: 4\n", "questions.txt": "Why?\nHow so?\n",
        "questions.jsonl": jsonl(*QUESTIONS), "questions.json": json.dumps(QUESTIONS),
        "prompts.jsonl": jsonl(PROMPT, PROMPT),
        "votes.json": json.dumps(VOTES), "judgments.jsonl": jsonl(JUDGMENT, JUDGMENT), "corrupt_rules.py": RULES,
        "notebook.py": NOTEBOOK, "template.jinja": "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}",
        "asked/run.json": json.dumps(ASKED_RUN), "asked/question.jsonl": jsonl(*QUESTIONS),
        "asked/model_answer/a.jsonl": answers("a"), "asked/model_answer/b.jsonl": answers("b"),
        "asked/reference_answer/gpt.jsonl": answers("gpt"),
        "run/run.json": json.dumps({"step": "dpo", "status": "finished"}),
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "pairs.jsonl.gz").write_bytes(gzip.compress(jsonl(*ROWS).encode()))


def table(delimiter: str) -> str:
    return "".join(delimiter.join(row) + "\n" for row in (ROWS[0], *(row.values() for row in ROWS)))


LINES = {name: fault for name, fault in TEXT.items() if name != "half"} | {
    "half a line": lambda old: old[: old.rstrip().rindex(b"\n") + 9] + b"\n",
    "lists": lambda old: b"[1]\n[2]\n",
    "numbers": lambda old: b"1\n2\n",
    "deep": lambda old: b'{"a": ' + DEEP + b"}\n",
}
BINARY = {name: WEIGHTS[name] for name in ("empty", "half", "zeros", "text")}
RECIPE = TEXT | {"list": lambda old: b"- 1\n", "deep": lambda old: b"a: " + DEEP, "text": lambda old: b"words\n"}
RECIPE.pop("half")  # of a YAML file half may be whole
CSV = {name: TEXT[name] for name in ("empty", "zeros", "utf-16", "latin-1")} | {
    "half a row": lambda old: old[: old.rindex(b"No.") - 3],
    "open quote": lambda old: old.replace(b"It is 3.", b'"It is 3.'),
}
PLAIN = {name: TEXT[name] for name in ("empty", "zeros", "utf-16", "latin-1")}
CODE = {name: TEXT[name] for name in ("zeros", "utf-16", "latin-1")} | {
    "half": lambda old: old[: old.index(b"True") - 1]
}
RUN = {name: fault for name, fault in JSON.items() if name not in ("mark", "utf-16")}  # which are read
JSON_FILE = {name: fault for name, fault in JSON.items() if name != "mark"}
TRAIN = ["02_dpo.py", "--model_id", "BASE", *SHORT, "--dataset_id"]
JUDGE = ["05_judge.py", "--answers_dir", "WORLD/asked"]
RULED = [*JUDGE, "--judge_module", "recipes.demo.questions"]
PAIRS = ["06_pairs.py", "--judge_module", "recipes.real"]
# The command, the file that is broken, and its faults.
OTHERS: list[tuple[list[str], str, dict[str, Callable[[bytes], bytes]]]] = [
    ([*TRAIN, "WORLD/pairs.jsonl"], "pairs.jsonl", LINES),
    ([*TRAIN, "WORLD/pairs.json"], "pairs.json", {n: f for n, f in JSON_FILE.items() if n != "deep"}),
    ([*TRAIN, "WORLD/pairs.json"], "pairs.json", {"deep": JSON["deep"]}),
    ([*TRAIN, "WORLD/pairs.csv"], "pairs.csv", CSV),
    ([*TRAIN, "WORLD/pairs.tsv"], "pairs.tsv", CSV),
    ([*TRAIN, "WORLD/pairs.jsonl.gz"], "pairs.jsonl.gz", BINARY),
    (["02_dpo.py", "--recipe", "WORLD/recipe.yaml", "--dry_run"], "recipe.yaml", RECIPE),
    ([*TRAIN, "WORLD/pairs.jsonl", "--chat_template", "WORLD/template.jinja"], "template.jinja", JINJA),
    (["04_vibes.py", "--models", "BASE", "--prompts_file", "WORLD/questions.txt"], "questions.txt", PLAIN),
    (["04_vibes.py", "--models", "BASE", "--prompts_file", "WORLD/questions.jsonl"], "questions.jsonl", LINES),
    (["04_vibes.py", "--models", "BASE", "--prompts_file", "WORLD/questions.json"], "questions.json", JSON_FILE),
    (RULED, "asked/run.json", RUN),
    (RULED, "asked/question.jsonl", LINES),
    (RULED, "asked/model_answer/a.jsonl", {n: f for n, f in LINES.items() if n != "empty"}),
    ([*RULED, "--bench_dir", "WORLD/asked"], "asked/reference_answer/gpt.jsonl",
     {name: fault for name, fault in LINES.items() if name != "empty"}),
    ([*JUDGE, "--votes", "WORLD/votes.json"], "votes.json", JSON_FILE),
    ([*JUDGE, "--judgments", "WORLD/judgments.jsonl"], "judgments.jsonl", LINES),
    ([*JUDGE, "--judge_model", "m", "--base_url", "http://127.0.0.1:9/v1", "--judge_prompts", "WORLD/prompts.jsonl"],
     "prompts.jsonl", LINES | {"another kind": lambda old: b'{"name": "pair", "system_prompt": 5}\n'}),
    ([*JUDGE, "--judge_module", "corrupt_rules"], "corrupt_rules.py", CODE),
    (["-m", "helpers", "sweep", "WORLD/notebook.py", "--dpo_beta", "0.1", "0.2"], "notebook.py",
     {name: TEXT[name] for name in ("empty", "utf-16", "latin-1")}),
    (["-m", "helpers", "report", "WORLD/run"], "run/run.json", RUN),
    (["-m", "helpers", "accept", "WORLD/run"], "run/run.json", RUN),
    (["03_merge_push.py", "--run", "WORLD/run"], "run/run.json", RUN),
    (["02_dpo.py", "--sft_run", "WORLD/run", *SHORT], "run/run.json", RUN),
    (["04_vibes.py", "--models", "WORLD/run", *ASKED], "run/run.json", RUN),
    ([*PAIRS, "--models", "BASE", "--prompts_file", "WORLD/questions.jsonl"], "questions.jsonl", LINES),
    ([*PAIRS, "--models", "BASE", "--prompts", "Why?", "--exclude", "WORLD/questions.jsonl"], "questions.jsonl", LINES),
    ([*PAIRS, "--models", "WORLD/run", "--prompts", "Why?"], "run/run.json", RUN),
    ([*PAIRS, "--answers_dir", "WORLD/asked"], "asked/question.jsonl", LINES),
    ([*PAIRS, "--answers_dir", "WORLD/asked"], "asked/model_answer/a.jsonl",
     {n: f for n, f in LINES.items() if n != "empty"}),
    (["06_pairs.py", "--answers_dir", "WORLD/asked", "--from_votes", "WORLD/votes.json"], "votes.json", JSON_FILE),
    (["06_pairs.py", "--answers_dir", "WORLD/asked", "--from_judgments", "WORLD/judgments.jsonl"], "judgments.jsonl",
     LINES),
    (["06_pairs.py", "--answers_dir", "WORLD/asked", "--judge_module", "corrupt_rules"], "corrupt_rules.py",
     {name: CODE[name] for name in CODE if name != "half"}),  # of which half can be imported, and is a score() still
    ([*PAIRS, "--models", "BASE", "--prompts", "Why?", "--chat_template", "WORLD/template.jinja"],
     "template.jinja", JINJA),
]  # fmt: skip
OTHER_CASES = [(words, file, fault) for words, file, faults in OTHERS for fault in faults]
QUICK_OTHERS = {("pairs.jsonl", "deep"), ("recipe.yaml", "list"), ("asked/model_answer/a.jsonl", "utf-16"),
                ("votes.json", "half"), ("run/run.json", "list")}  # fmt: skip


@pytest.mark.parametrize(
    ("words", "file", "fault"),
    [
        pytest.param(*case, id="-".join([case[0][0][:2], case[0][2][-12:], *case[1:]]).replace(" ", "_"),
                     marks=marks(case[1:] in QUICK_OTHERS and case[0][0] != "04_vibes.py"))
        for case in OTHER_CASES
    ],
)  # fmt: skip
def test_another_broken_file_is_named_before_anything_is_written(
    words: list[str], file: str, fault: str, project: Project, demo_folder: Path, tmp_path: Path
) -> None:
    world = tmp_path / "world"
    write_world(world)
    faults = next(faults for each, name, faults in OTHERS if each == words and name == file and fault in faults)
    old = (world / file).read_bytes()
    (world / file).write_bytes(new := faults[fault](old))
    assert new != old
    base = str(demo_folder / "tiny-mistral")
    words = [word.replace("WORLD", str(world)) if word != "BASE" else base for word in words]
    name = Path(file).stem if file.endswith(".py") else Path(file).name
    refused(project, tmp_path / "out", words, name, PYTHONPATH=f"{project.root}:{world}")
    assert not [each for each in world.rglob("*") if each.suffix in (".html", ".png")]


def test_broken_calls_of_another_run_stop_no_judge(project: Project, tmp_path: Path) -> None:
    write_world(world := tmp_path / "world")
    outputs = tmp_path / "out"
    faults = LINES | {"another kind": lambda old: jsonl({"models": 5}, {"winner": "a"}, {"asked": 1}).encode()}
    for i, fault in enumerate(faults.values()):
        (outputs / f"judge-{i}").mkdir(parents=True)
        (outputs / f"judge-{i}" / "calls.jsonl").write_bytes(fault(jsonl(*QUESTIONS).encode()))
    words = [*JUDGE, "--judge_model", "m", "--base_url", "http://127.0.0.1:9/v1", "--dry_run"]
    words = [word.replace("WORLD", str(world)) for word in words]
    shown = project.run(*words, "--output_dir", str(outputs)).stdout
    assert "4 calls like this one" in shown
    assert (
        shown.count("are not used again: calls.jsonl, line ") == len(faults) - 3
    )  # not of an unended line, or another kind


def test_a_broken_dotenv_is_one_line(project: Project, tmp_path: Path) -> None:
    for fault, said in (("zeros", "NUL bytes"), ("utf-16", "not UTF-8"), ("latin-1", "not UTF-8")):
        (project.root / ".env").write_bytes(TEXT[fault](b"DPO_LORA_R=4\nHF_HOME=/tmp/x\n"))
        try:
            error = refused(project, tmp_path / "out", ["02_dpo.py", "--dry_run"], ".env", real=True)
        finally:
            (project.root / ".env").unlink()
        assert said in error
