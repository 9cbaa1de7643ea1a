"""Questions to ask models, rows of their answers, and prompts to ask judges, in FastChat's layouts."""

from __future__ import annotations

import contextlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from helpers.core import Row, SettingsError, UserError, find_path, fingerprint, printable, read_jsonl, short_path
from helpers.data.formats import MORE_COLUMNS, TEMPLATE_COLUMNS, row_template_options, template_columns
from helpers.data.loading import DatasetSpec, decode, file_type, load_rows, read_bytes
from helpers.data.messages import DropRow, Message, is_list_as_text, parse_hh, parse_text, to_messages, unusable

Question = dict[str, Any]
OUR_QUESTIONS = Path(__file__).with_name("questions.jsonl")
OUR_PROMPTS = Path(__file__).with_name("judge_prompts.jsonl")
NOTHING_ANSWERED = "Nothing to judge: no question has answers of all of {}. Run 04_vibes.py with them together."
# FastChat (llm_judge/common.py) shows a reference in these categories only.
REFERENCE_CATEGORIES = ("math", "reasoning", "coding", "arena-hard-200")
FASTCHAT_NAMES = {"pairwise": ("pair-v2", "pair-math-v1"), "single": ("single-v1", "single-math-v1")}
# Columns that hold the question; the first one present is used. `prompt` may be a list of turns (MT-Bench on the Hub).
COLUMNS = ("turns", "messages", "conversations", "prompt", "instruction", "question")
IDS = ("question_id", "prompt_id", "id")
USED = (
    *COLUMNS,
    *IDS,
    "category",
    "reference",
    "system",
    "system_prompt",
    *TEMPLATE_COLUMNS,
)  # columns that are read; others are kept as they are
# How templates mark thoughts: DeepSeek, Qwen and many more; Magistral; Command A; Kimi; OpenThinker; Apertus; Gemma 4;
# gpt-oss. A marker between backticks is only mentioned.
_BEGIN = (
    r"<(?:seed:)?(?:think(?:ing)?|thoughts?|reasoning)>|\[THINK\]|<\|START_THINKING\|>|◁think▷|<\|begin_of_thought\|>|"
    r"<\|inner_prefix\|>|<\|channel>thought|<\|channel\|>(?:analysis|commentary)[^<]*<\|message\|>"
)
_END = (
    r"</(?:seed:)?(?:think(?:ing)?|thoughts?|reasoning)>|\[/THINK\]|<\|END_THINKING\|>|◁/think▷|<\|end_of_thought\|>|"
    r"<\|inner_suffix\|>|<channel\|>|<\|channel\|>final[^<]*<\|message\|>"
)
_BEGIN, _END = rf"(?:(?<!`)(?:{_BEGIN})|(?:{_BEGIN})(?!`))", rf"(?:(?<!`)(?:{_END})|(?:{_END})(?!`))"
THOUGHTS = re.compile(rf"{_BEGIN}.*?{_END}|\A\s*Here is my thought process:.*?Here is my response:", re.S | re.I)
THOUGHT_END = re.compile(_END, re.I)
UNENDED_THOUGHT = re.compile(rf"^[ \t]*{_BEGIN}.*\Z", re.S | re.I | re.M)
MARKS_OF_THOUGHTS = re.compile(rf"{_BEGIN}|{_END}", re.I)
OPEN_THOUGHT = re.compile(rf"{_BEGIN}\s*\Z", re.I)  # at the end of a prompt


def read_questions(settings: Any) -> list[Question]:
    """The questions that `settings` name by --prompts, --prompts_file or --dataset_id; else the built-in ones.

    --rows takes the first so many, 0 takes all. Raises UserError for a source without questions, or a repeated id.
    """
    if settings.prompts_file:
        source, rows = f"--prompts_file {settings.prompts_file!r}", _read_file("--prompts_file", settings.prompts_file)
    elif settings.dataset_id:
        source, split = f"--dataset_id {settings.dataset_id!r}", settings.dataset_split
        dataset = load_rows(DatasetSpec(settings.dataset_id, split=split or "train", any_split=not split))
        rows = dataset.take(min(settings.rows or len(dataset), len(dataset))).to_list()
    else:
        source, rows = "--prompts", [{"turns": [prompt]} for prompt in settings.prompts] or read_jsonl(OUR_QUESTIONS)
    return _parse_rows(rows[: settings.rows or None], source)


def find_input(flag: str, name: str, kind: str = "file") -> Path:
    """The file or folder that a flag names. Raises UserError if it is not there, or of the other kind."""
    path = find_path(name)
    if path is None or not (path.is_file() if kind == "file" else path.is_dir()):
        raise UserError(f"{flag} {name!r} is not a {kind}")
    return path


def read_question_file(flag: str, name: str) -> list[Question]:
    """The questions of the file that a flag names. Raises UserError as `read_questions`."""
    return _parse_rows(_read_file(flag, name), f"{flag} {name!r}")


def _read_file(flag: str, name: str) -> list[Row]:
    path = find_input(flag, name)
    kind = file_type(path)
    if kind == "jsonl" and path.suffix == ".jsonl":
        return read_jsonl(path)
    if kind:
        return list(load_rows(DatasetSpec(str(path))))
    lines = decode(read_bytes(path), path).split("\n")  # not splitlines: a text may hold other line separators
    return [{"turns": [line.rstrip("\r")]} for line in lines if line.strip()]


def _parse_rows(rows: list[Row], source: str) -> list[Question]:
    questions, dropped = [], dict[str, list[int]]()
    ids = {str(_own_id(row)) for row in rows}
    for number, row in enumerate(rows, 1):
        try:
            questions.append(_parse_row(row, f"row {number}" if str(number) in ids else number))
        except DropRow as reason:
            dropped.setdefault(str(reason), []).append(number)
    reasons = "; ".join(f"{reason}: {len(numbers)} (row {numbers[0]})" for reason, numbers in dropped.items())
    if not questions:
        raise UserError(f"{source} has no questions. {reasons}".rstrip(" ."))
    if dropped:
        print(f"{source}: {len(rows) - len(questions)} of {len(rows)} rows were dropped. {printable(reasons)}")
    [(name, count)] = Counter(str(q["question_id"]) for q in questions).most_common(1)
    if count > 1:
        raise UserError(f"{source} has the question id {name} twice")
    return questions


def _parse_row(row: Row, number: int | str) -> Question:
    """Raises DropRow for a row without a question, for the reasons of `helpers.data`."""
    column = next((c for c in COLUMNS if row.get(c)), "")
    turns: Any = row.get(column)
    system, reference = row.get("system") or row.get("system_prompt") or "", row.get("reference") or []
    rest = {name: value for name, value in row.items() if name not in USED}
    more = [given for name in MORE_COLUMNS if column == "instruction" and (given := rest.pop(name, ""))]
    turns = "\n\n".join([turns, *more]) if more else turns
    if is_list_as_text(turns):
        with contextlib.suppress(DropRow):  # a prompt may begin with JSON
            turns = parse_text(turns)
    turns = parse_hh(turns) or turns
    if isinstance(turns, dict) or (isinstance(turns, list) and any(isinstance(turn, dict) for turn in turns)):
        messages = to_messages(turns, "user")  # only the user's turns are asked
        system = next((m["content"] for m in messages if m["role"] == "system"), system)
        turns = [m["content"] for m in messages if m["role"] == "user"]
    turns = [turns] if isinstance(turns, str) else turns
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t.strip() for t in turns):
        raise unusable("prompt", next((t for t in turns if t), None) if isinstance(turns, list) else turns)
    question: Question = {
        "question_id": own if (own := _own_id(row)) is not None else number,
        "category": str(row.get("category") or "general"),
        "turns": [_clean(turn) for turn in turns],
    }
    if reference:
        question["reference"] = [_clean(text) for text in (reference if isinstance(reference, list) else [reference])]
    if system:
        question["system"] = _clean(system)
    return question | template_columns(row_template_options(row)) | rest


def _own_id(row: Row) -> int | str | None:
    """The id of a row; None for one without, or with a blank one."""
    return next((row[name] for name in IDS if isinstance(row.get(name), int | str) and str(row[name]).strip()), None)


def _clean(text: object) -> str:
    """Replace lone surrogates, which neither a tokenizer nor a server accepts."""
    return str(text).encode("utf-8", "replace").decode("utf-8")


def read_bench(folder: Path) -> list[Question]:
    """The questions of a FastChat folder, with the references of its reference_answer/*.jsonl."""
    file = folder / "question.jsonl"
    if not file.is_file():
        raise UserError(f"{str(folder)!r} has no question.jsonl")
    questions = _parse_rows(read_jsonl(file), str(file))
    references: dict[str, list[Answer]] = {}
    for answers in sorted((folder / "reference_answer").glob("*.jsonl")):
        references |= {str(row.get("question_id")): answer_turns(row) for row in read_jsonl(answers)}
    return [q | ({"reference": references[i]} if (i := str(q["question_id"])) in references else {}) for q in questions]


class Answer(str):
    """The text of an answer without its thoughts, which `raw` has; `cut` if it reached the limit of tokens."""

    raw: str
    cut: bool
    refused: str  # why there is no answer

    def __new__(cls, raw: str, cut: bool = False, refused: str = "", text: str | None = None) -> Answer:
        answer = super().__new__(cls, strip_thoughts(_clean(raw if text is None else text)))
        answer.raw, answer.cut, answer.refused = _clean(raw), cut, refused
        return answer

    @property
    def thoughts(self) -> str:
        """What `raw` has besides the answer, without the marks of thoughts; "" for an answer without any."""
        rest = self.raw.rpartition(self)[0] if self else self.raw
        return MARKS_OF_THOUGHTS.sub("", rest).strip()


def strip_thoughts(text: str) -> str:
    """A reply without its thoughts: blocks between the markers of any template; all before an end without a beginning,
    which many templates put into the prompt; all from a beginning at the start of a line that has no end."""
    answer = UNENDED_THOUGHT.sub("", THOUGHT_END.split(THOUGHTS.sub("", text))[-1])
    return text if answer == text and text.strip() else answer.strip()


def answer_turns(row: Row, index: int = 0) -> list[Answer]:
    """The answers in a row of FastChat's model_answer, one per turn, of the choice `index`. Raises UserError for any
    other row.

    Ours may also have the raw texts, if they differ, and which are `cut`.
    """
    with contextlib.suppress(LookupError, TypeError, ValueError):
        choice = row["choices"][index]
        turns = choice["turns"]
        raw, cut = choice.get("raw", turns), choice.get("cut", [False] * len(turns))
        if isinstance(turns, list) and all(isinstance(text, str) for text in [*turns, *raw]):
            return [Answer(r, cut=bool(c), text=t) for t, r, c in zip(turns, raw, cut, strict=True)]
    raise UserError(f"row is not from a model_answer file with a text per turn: {json.dumps(row)[:80]}")


def safe_file_name(model: str, unique: bool = False) -> str:
    """A model's name as a file name: characters that a file system refuses become hyphens.

    A long name is cut and ends in its hash; a `unique` one, for a plain one that is taken, ends in its hash too.
    """
    name = re.sub(r'[/\\:*?"<>|\x00-\x1f]', "-", model).encode(errors="replace")
    if unique or len(name) > 120:
        return name[:100].decode(errors="ignore") + f"-{fingerprint(model)[:8]}"
    return name.decode()


def file_name_key(name: str) -> str:
    """The same for names that a file system without case, or with one form of Unicode, takes for one."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def file_owner(rows: list[Row], stem: str) -> str:
    """The model of a file of answers: the one in its rows that the file is named after, or else the first of several.
    Where all rows have another name, somebody has renamed the file, and its name is the model's, as in FastChat."""
    models = list(dict.fromkeys(str(row.get("model_id", stem)) for row in rows))
    named = {file_name_key(safe_file_name(model, unique)): model for unique in (True, False) for model in models[::-1]}
    return named.get(file_name_key(stem), models[0] if len(models) > 1 else stem)


def choose_models(names: Iterable[str], found: Iterable[str]) -> list[str]:
    """The models of `found` that names mean, each once. Raises SettingsError for a name that means none."""
    chosen = list(dict.fromkeys(model_name(name, found) for name in names))
    if lost := [name for name in chosen if name not in found]:
        raise SettingsError(f"There are no answers of {', '.join(lost)}. Use one of: {', '.join(found)}.")
    return chosen


def model_name(name: str, known: Iterable[str]) -> str:
    """The model of `known` that a name or the path of its run means; `name` if there is none."""
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    return last if name not in known and last in known else name


def read_answer_files(files: list[Path]) -> dict[str, dict[str, Row]]:
    """The rows of each model by question id. Rows of a second model in a file are that model's, and printed."""
    found, strays = dict[str, dict[str, Row]](), dict[str, dict[str, Row]]()
    for file in files:
        rows = read_jsonl(file)
        owner = file_owner(rows, file.stem)
        models = {str(row.get("model_id", owner)) for row in rows}
        for row in rows:
            model = str(row.get("model_id", owner)) if len(models) > 1 else owner
            (found if model == owner else strays).setdefault(model, {})[str(row.get("question_id"))] = row
        if len(models) > 1:
            print(printable(f"note: {file.name} has rows of {', '.join(sorted(models))}. Each counts for its model."))
    return found | {model: rows | found.get(model, {}) for model, rows in strays.items()}


def question_turns(question: Question, with_tools: bool = True) -> list[str]:
    """The user's turns as a judge reads them: a system prompt and tools are put before the first."""
    first, *rest = question["turns"]
    tools = f"(Tools: {json.dumps(question['tools'])})\n\n" if with_tools and question.get("tools") else ""
    system = f"(System prompt: {question['system']})\n\n" if question.get("system") else ""
    return [system + tools + first, *rest]


class JudgePrompts:
    """The prompts of a file, by default ours. FastChat's are recognized by their names."""

    def __init__(self, file: Path = OUR_PROMPTS) -> None:
        self.rows = {str(row.get("name")): row for row in read_jsonl(file)}
        for name, row in self.rows.items():
            if not all(isinstance(row.get(key), str) for key in ("name", "system_prompt", "prompt_template")):
                raise UserError(f"{short_path(file)}: {name} needs a name, a system_prompt and a prompt_template.")
        self.file, self.is_fastchat = file, "pair-v2" in self.rows

    @classmethod
    def of(cls, settings: Any) -> JudgePrompts:
        """Those of --judge_prompts, or else of --bench_dir if it has any. Raises UserError."""
        if settings.judge_prompts:
            return cls(find_input("--judge_prompts", settings.judge_prompts))
        file = (find_path(settings.bench_dir) or OUR_PROMPTS.parent) / OUR_PROMPTS.name
        return cls(file if file.is_file() else OUR_PROMPTS)

    def name_for(self, question: Question, turn: int, mode: str) -> str:
        """The prompt for a turn (from 1) of a question. Raises UserError if the file lacks it."""
        has_reference = len(question.get("reference", ())) >= turn
        if self.is_fastchat:
            name = FASTCHAT_NAMES[mode][has_reference and question["category"] in REFERENCE_CATEGORIES]
        else:
            name = mode.removesuffix("wise") + "-reference" * has_reference
        name += "-multi-turn" * (turn > 1)
        if name not in self.rows:
            raise UserError(f"{self.file} has no prompt named {name}; it has {', '.join(sorted(self.rows))}")
        return name

    def make_matches(
        self,
        questions: list[Question],
        answers: dict[str, dict[Any, list[Any]]],
        pairs: list[tuple[str, ...]],
        mode: str,
    ) -> list[Row]:
        """Every call to make: for each question and turn both orders of each pair, or each model alone.

        A match is the start of a row of calls.jsonl: {"question_id", "turn" (from 1), "models" as shown, "prompt"}. A
        turn that a model of the pair has not answered is skipped. Raises UserError if nothing is left.
        """
        matches = []
        for question in questions:
            i, turns = question["question_id"], len(question["turns"])  # FastChat's prompts have room for two
            for turn in range(1, (min(turns, 2) if self.is_fastchat else turns) + 1):
                name = self.name_for(question, turn, mode)
                for pair in pairs:
                    if all(len(answers[model].get(i, ())) >= turn for model in pair):
                        orders = [pair, pair[::-1]] if mode == "pairwise" else [pair]
                        matches += [{"question_id": i, "turn": turn, "models": [*o], "prompt": name} for o in orders]
        if not matches:
            raise UserError(NOTHING_ANSWERED.format(" and ".join(pairs[0])))
        return matches

    def messages(self, match: Row, question: Question, answers: dict[str, dict[Any, list[str]]]) -> list[Message]:
        """System and user message for a match. Raises UserError for a template with an unknown field."""
        row, turn, models = self.rows[match["prompt"]], match["turn"], match["models"]
        asked, reference = question_turns(question), question.get("reference", [])
        fields: dict[str, Any] = {"question": asked[turn - 1], "reference": _transcript(asked, reference, turn)}
        fields |= {f"question_{i}": text for i, text in enumerate(asked, 1)}
        fields |= {f"ref_answer_{i}": text for i, text in enumerate(reference, 1)}
        for side, model in zip(("_a", "_b") if len(models) > 1 else ("",), models, strict=True):
            turns = answers[model][question["question_id"]]
            fields |= {f"answer{side}": turns[turn - 1], f"conversation{side}": _transcript(asked, turns, turn)}
            fields |= {f"answer{side}_{i}": text for i, text in enumerate(turns, 1)}
        try:
            text = row["prompt_template"].format(**fields)
        except (LookupError, ValueError) as error:
            raise UserError(f"{self.file}: the template of {match['prompt']} cannot be filled in: {error}") from None
        return [{"role": "system", "content": row["system_prompt"]}, {"role": "user", "content": text}]


def _transcript(asked: list[str], answers: list[str], turn: int) -> str:
    if turn == 1:
        return "".join(answers[:1])
    pairs = zip(asked[:turn], answers[:turn], strict=False)
    return "\n\n".join(f"## User\n\n{question}\n\n## Assistant\n\n{answer}" for question, answer in pairs)


def answers_folder(settings: Any) -> Path:
    """The run or folder that --answers_dir names; of a run's model_answer, the run itself. Raises UserError."""
    folder: Path = settings.output_dir / settings.answers_dir
    folder = folder if folder.is_dir() else find_input("--answers_dir", settings.answers_dir, "folder").resolve()
    return folder.parent if folder.name == "model_answer" and not (folder / "question.jsonl").is_file() else folder


def read_answers(folder: Path, bench: Path | None = None) -> tuple[list[Question], dict[str, dict[str, Row]]]:
    """The questions of a folder in FastChat's layout, or of `bench`, and each model's rows by question_id as text.
    Raises UserError."""
    place = folder / "model_answer" if (folder / "model_answer").is_dir() else folder
    found = read_answer_files(sorted({*place.glob("*.jsonl")} - {folder / "question.jsonl"}))
    if not found:
        raise UserError(f"{short_path(place)} has no answers. Give a folder with FastChat's NAME.jsonl for each model.")
    for name, rows in found.items():
        try:
            for row in rows.values():
                for index in range(len(row.get("choices") or [0])):
                    answer_turns(row, index)
        except UserError as error:
            raise UserError(f"{short_path(place)}, answers of {name}: {error}") from None
    return read_bench(bench or (folder if (folder / "question.jsonl").is_file() else folder.parent)), found
