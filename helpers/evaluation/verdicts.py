"""Verdicts: what a judge's reply says, those of a reward model (a classifier with one logit), and those of rules."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import re
import traceback
from collections.abc import Callable, Sequence
from statistics import fmean
from types import ModuleType
from typing import Any, cast

from helpers.core import Row, SettingsError, UserError, fingerprint, import_user_module, printable
from helpers.data.formats import row_template_options
from helpers.data.messages import Message
from helpers.evaluation.answers import JsonlStore
from helpers.evaluation.judgments import AnswerSet, Judge, Judgments, pair_row, tie_row
from helpers.evaluation.questions import NOTHING_ANSWERED, Answer, Question, strip_thoughts
from helpers.models.adapters import display_name, load_adapter, read_pretrained
from helpers.models.chat import EachOptions, fold_system_message, render, supports_system_role, tokenize
from helpers.models.plan import plan_model, prepare_model
from helpers.models.resolve import ModelRef, fetch_file, resolve_adapter, resolve_model
from helpers.runs.run import Run
from helpers.runs.start import resumable

SCORER_NEEDED = "Use a model that was trained with one score, such as those of TRL's RewardTrainer."
# [[A]], [[ 9/10 ]], [[Assistant B]] ...; its last bracket may be missing at the end of a reply. [[1]](url) is a link.
BRACKETED = re.compile(r"\[\s*\[([^\[\]]{1,60})\](?:\s*\](?!\()|\W*\Z)")
VERDICT = re.compile(
    r"(?:(?:my|the|final|verdict|winner|choice|is|assistant|answer|model|response|option|conversation)\b\W*)*"
    r"(?:a\s+)?(tie|draw|[abc])(?:\W+(?:s|is|wins?|better|the|winner|best|a|tie|c|answer|response))*", re.I,
)  # fmt: skip
NUMBER = r"(\d+(?:[.,]\d+)?)(?:\s*(?:/|(?:out )?of)\s*(\d+)(?:\.0+)?)?"  # and what it is out of
RATING = re.compile(rf"(?:(?:my|the|final|overall|rating|score|is)\b\W*)*{NUMBER}", re.I)
# Without the brackets: a line, or for a rating a sentence, that says what it is.
LABEL = r"[^\w\n]{0,20}(?:(?:my|the|final|overall)\W{1,20})*"
LABELLED_VERDICT = re.compile(
    rf"^{LABEL}(?:verdict|decision|judge?ment|choice|winner)\b\W{{0,20}}(?:is\b)?\W{{0,20}}(.+)$", re.I | re.M
)
LABELLED_RATING = re.compile(
    rf"(?:(?:^|[.!?]\s){LABEL}(?:rating|score|grade)\b(?: ?\([^)\n]*\))?[^\w\n]*(?:is\b[^\w\n]*)?"
    r"|\bI(?:'(?:d|ll)| would| will)? (?:rate|give|score)\b[^.\n\d]{0,60}(?=[\d.,]+\s*(?:/|out of|\W*$))"
    r"|^[^\w\n]{0,20}(?=[\d.,]+\s*(?:/|out of)))"
    rf"{NUMBER}(?![\d.,/]*\d|…|\s*-\s*\d|\s*(?:to|or|and|for|would)\b)", re.I | re.M,
)  # fmt: skip
# What is in the same sentence before or after a verdict that is denied, quoted, supposed or explained.
NOT_GIVEN_BEFORE = re.compile(
    r"(?:\b(?:not|never|neither|nor|cannot|rather than|than|instead of|considered|tempted"
    r"|(?:wrong|unfair|hard|tempting)(?= to))|n't)"
    r"(?:\s+(?:to|a|an|the|it|be|is|my|as|of|for|with|go|say|choose|pick|select|give|award|call|think|vote|prefer"
    r"|verdict|rating))*[\s\"'`*(]*$"
    r"|\b(?:says|said|wrote|writes|contains|includes|quotes|returns|outputs|prints|ends with|asks|told|tells)[:,]?\s+"
    r"(?:[\w']+ +){0,4}[\"'`*(]*$"
    r"|\b(?:give|output|write|state) your\b|\be\.g\.|\bfor example\b|\binitial|\bat first\b"
    r"|\bfirst (?:thought|impression)\b|\b(?:would|could|might) (?:not )?have\b", re.I,
)  # fmt: skip
NOT_GIVEN_AFTER = re.compile(
    r"[\"'`*)\s]*(?:(?:if|when|means?|indicates?|is for|for a tie|at first|initially|(?:is|was) (?:not|wrong)|isn)\b"
    r"|(?:would|could|might)\b(?! be (?:my|the (?:right|fair|final|correct)\b)))", re.I,
)  # fmt: skip
DECISIVE_BEFORE = re.compile(
    r"\b(?:verdict|decision|judge?ment|final(?:ly)?|overall|conclu\w+|winner|choice|cho+se|pick|prefer|therefore|thus|hence"
    r"|rating|rate|score|give|award|settle|in the end|no|actually|wait|go with|goes to)\b", re.I,
)  # fmt: skip
DECISIVE_AFTER = re.compile(r"\W*(?:it is|wins|remains|is my)\b", re.I)
CLAUSE_END = re.compile(r"\n|;|(?<=[.!?])(?<!e\.g\.)\s+|\b(?:but|however|yet)\b", re.I)
JOINT = re.compile(r"(?:or|and|nor|vs|versus|maybe|perhaps|possibly|even)*")
INDEX = re.compile(r"[A-Za-z0-9_)\]]$|\w\($")  # before a number in brackets: x[[1]], f([[1]])


def strip_reasoning(text: str) -> str:
    """A judge's reply without its thoughts and empty lines. Quotes and dashes become ASCII."""
    text = strip_thoughts(text).translate(str.maketrans("\u2018\u2019\u201c\u201d\u2013", "''\"\"-"))
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


def parse_verdict(text: str) -> str:
    """The last verdict that a reply gives: "A", "B" or "tie" ([[C]]); "error" if it gives none, or none that is clear.
    FastChat takes the first of A, B and C that occurs anywhere, also one that is quoted or denied."""
    text = strip_reasoning(text)
    verdict = _last_given(text, _read_verdict)
    if verdict is None:
        plain = [v for found in LABELLED_VERDICT.finditer(text) if (v := _read_verdict(found[1]))]
        plain = plain or re.findall(r"^\W*\[([ABC])\]\W*$|\A\W*([ABC])\W*\Z", text, re.MULTILINE)[:1]
        verdict = "".join(plain[-1:] and plain[-1])
    return str(verdict or "error").replace("C", "tie")


def parse_rating(text: str) -> float:
    """The last rating that a reply gives, from 1 to 10; -1 as in FastChat if it gives none, or none that is clear. A
    rating is in double brackets or is called one: a number in single brackets may be a citation or an index."""
    text = strip_reasoning(text)
    rating = _last_given(text, _read_rating)
    if rating is None:
        plain = [_read_rating(f"{number}/{scale or 10}") for number, scale in LABELLED_RATING.findall(text)]
        rating = (plain or [_read_rating(text)])[-1]
    return float(rating or -1)


def _read_verdict(text: str) -> str | None:
    found = VERDICT.fullmatch(text.replace("_", " ").strip(" \n\t*`'\":.!-()[]"))
    return {"a": "A", "b": "B"}.get(found[1].lower(), "C") if found else None


def _read_rating(text: str) -> float | None:
    """The number in a text that has nothing else; -1 for one that is out of range or unclear."""
    found = RATING.fullmatch(text.strip(" \n\t*`'\":.![]"))
    rating = float(found[1].replace(",", ".")) if found and found[2] in (None, "10") else -1.0
    return rating if 1 <= rating <= 10 else -1.0 if re.search(r"\d", text) else None


def _last_given(text: str, read: Callable[[str], Any]) -> Any:
    """The last value in double brackets that is given, not only mentioned. None if there is none; "" if it is unclear.
    Of several that differ, one is clear if it is alone on a line, or with a word such as "verdict" before it."""
    text = re.sub(r"\\(?=[\[\]])|</?[a-z]+>", "", text)  # escapes and tags
    if re.search(r"\[\s*\[[^\[\]]*\Z", text):
        return ""  # cut off
    mentions: list[list[Any]] = []  # value, whether it is given, denied or listed with others, whether it is clear
    end = 0
    for found in BRACKETED.finditer(text):
        between, rest = text[end : found.start()], text[found.end() : found.end() + 300]
        scale = re.match(r"\s*(?:/|out of)\s*[\d.]+", rest)
        rest = rest[scale.end() :] if scale else rest
        value = read(found[1] + (scale[0] if scale else ""))
        if value is None or (isinstance(value, float) and INDEX.search(text[: found.start()])):
            continue
        before, after = CLAUSE_END.split(between)[-1], CLAUSE_END.split(rest, maxsplit=1)[0]
        end = found.end()
        state = "denied" if NOT_GIVEN_BEFORE.search(before) or NOT_GIVEN_AFTER.match(after) else "given"
        joint = re.sub(r"\W+", "", between).lower()
        if mentions and mentions[-1][0] != value and JOINT.fullmatch(joint):
            if mentions[-1][1] == "denied":
                state = "denied" if joint else state
            elif state == "given":
                state = mentions[-1][1] = "listed"
        starts, ends = not re.search(r"\w", before), not re.search(r"\w", after)
        clear = DECISIVE_BEFORE.search(before) or DECISIVE_AFTER.match(after) or (starts and ends)
        mentions.append([value, state, bool(clear), starts or ends or isinstance(value, str)])
    given = [mention for mention in mentions if mention[1] == "given"]
    if len({mention[0] for mention in given}) == 1:
        return next((value for value, _, clear, alone in given if clear or alone), None)
    is_unclear = bool(given) or any(state == "listed" for _, state, _, _ in mentions)
    return next((value for value, _, clear, _ in reversed(given) if clear), "" if is_unclear else None)


class RewardModel:
    """A classifier with one logit: a Hub id, a folder, or a LoRA adapter of one. It is loaded when it first scores.
    Raises UserError for a model that has no such logit, or no chat template."""

    def __init__(self, name: str, quantization: str = "none", batch_size: int = 8, remote_code: bool = False) -> None:
        from transformers import AutoConfig, AutoTokenizer

        self.name, self.quantization, self.batch_size = display_name(name), quantization, batch_size
        try:
            fetch_file(name, None, "adapter_config.json")
        except UserError:  # no adapter
            self.ref = ModelRef(name, resolve_model(name))
        else:
            self.ref = resolve_adapter(name)
        self._options: dict[str, Any] = {"trust_remote_code": remote_code}
        revision = {"revision": self.ref.revision or "main"}
        self.config = read_pretrained(AutoConfig, self.ref.base, **self._options, **revision)
        of_base = revision if self.ref.tokenizer == self.ref.base else {}
        self.tokenizer = read_pretrained(AutoTokenizer, self.ref.tokenizer, **self._options, **of_base)
        self._options |= revision
        kind, labels = (self.config.architectures or ["without a head"])[0], self.config.num_labels
        is_classifier = "SequenceClassification" in kind
        if self.ref.adapter and not is_classifier:  # on a language model; the adapter's files have the head
            self.config.num_labels = 1
        elif labels != 1:
            what = f"a classifier with {labels} labels" if is_classifier else f"no classifier ({kind})"
            raise UserError(f"{self.name} is {what}, not a reward model. {SCORER_NEEDED}")
        if not self.tokenizer.chat_template:
            raise UserError(f"{self.name} has no chat template. {SCORER_NEEDED}")
        self._has_system_role = supports_system_role(self.tokenizer)
        # of the weights, how they are loaded, and the chat template
        self.fingerprint = fingerprint(self.ref.fingerprint, quantization, str(self.tokenizer.chat_template))

    def score_answers(self, answered: Sequence[tuple[Question, Sequence[str]]]) -> list[float]:
        """The score of each question with the answers to its turns. Raises UserError as `score`."""
        talks = [conversation(question, answers) for question, answers in answered]
        return self.score(talks, [row_template_options(question) for question, _ in answered])

    def score(self, conversations: Sequence[list[Message]], options: EachOptions = None) -> list[float]:
        """The logit of each conversation, equal to that of the model alone on it. `options` are what its template is
        given besides, such as tools. Raises UserError for one that is too long, or a score that is not a number."""
        import torch

        talks = [fold_system_message(talk, self._has_system_role) for talk in conversations]
        texts = [render(self.tokenizer, t, options=o) for t, o in zip(talks, options or [{}] * len(talks), strict=True)]
        rows = tokenize(self.tokenizer, texts)
        longest = max(map(len, rows), default=0)
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None) or longest
        if longest > limit:
            raise UserError(f"A conversation has {longest:,} tokens, and {self.name} takes {limit:,}. Leave it out.")
        scores, order = [math.nan] * len(rows), sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        with torch.inference_mode():
            for start in range(0, len(rows), self.batch_size):
                batch = order[start : start + self.batch_size]
                for i, logit in zip(batch, self._logits([rows[i] for i in batch]), strict=True):
                    scores[i] = logit
        if lost := [i for i, score in enumerate(scores) if not math.isfinite(score)]:
            where = f"{len(lost)} of {len(scores)}, the first for {printable(repr(texts[lost[0]][:80]))}"
            raise UserError(f"The scores of {self.name} contain NaN or Inf ({where}). Restore its files.")
        return scores

    def _logits(self, rows: list[list[int]]) -> list[float]:
        """The logits of one batch. It is padded on the right, where causal layers do not see it and absolute positions
        stay as they are; with the token that the model takes for padding, behind which it looks for the last token."""
        import torch

        config = self.model.config.get_text_config()
        width, used = max(map(len, rows)), {i for row in rows for i in row}
        pad = next(i for i in range(len(used) + 1) if i not in used) if self._padding is None else self._padding
        config.pad_token_id = pad  # the model refuses batches without it; any id that no row has will do
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=self.model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.model.device)
        return [*self.model(input_ids=ids, attention_mask=mask).logits[:, 0].float().tolist()]

    @functools.cached_property
    def model(self) -> Any:
        """The loaded model. Raises UserError if its files lack the head, which would be drawn at random."""
        from peft.utils import load_peft_weights
        from transformers import AutoModelForSequenceClassification

        ref = self.ref
        plan = plan_model(ref.base, "none", self.quantization, task="SEQUENCE_CLASSIFICATION")
        model, found = AutoModelForSequenceClassification.from_pretrained(
            ref.base, config=self.config, quantization_config=plan.quantization, output_loading_info=True,
            dtype=plan.dtype, attn_implementation=plan.attn_implementation, device_map=plan.device_map, **self._options,
        )  # fmt: skip
        own = load_peft_weights(ref.adapter, device="cpu") if ref.adapter else {}
        for name in found["missing_keys"]:
            if not name.startswith(f"{model.base_model_prefix}."):
                saved = next((weight for key, weight in own.items() if key.endswith(f".{name}")), None)
                if saved is None:
                    raise UserError(f"{self.name} has no weights for its head ({name}). {SCORER_NEEDED}")
                if len(saved) != 1:
                    raise UserError(f"{self.name} is an adapter with {len(saved)} labels, not 1. {SCORER_NEEDED}")
                model.get_parameter(name)._is_hf_initialized = True  # load_adapter will fill it
        prepare_model(model, self.tokenizer, ref.adapter)
        model = load_adapter(model, ref.adapter) if ref.adapter else model
        pad = model.config.get_text_config().pad_token_id  # of its training, if it has a row in the embeddings
        self._padding: int | None = pad if pad in range(model.get_input_embeddings().num_embeddings) else None
        return model.eval()


def prompt_messages(question: Question) -> list[Message]:
    """The prompt of a question: its system message, if it has one, and its first turn."""
    system: list[Message] = [{"role": "system", "content": question["system"]}] if question.get("system") else []
    return [*system, {"role": "user", "content": question["turns"][0]}]


def conversation(question: Question, answers: Sequence[str]) -> list[Message]:
    """A question's turns with the answers to them."""
    talk = prompt_messages(question)[:-1]
    for asked, answer in zip(question["turns"], answers, strict=False):
        talk += [{"role": "user", "content": asked}, {"role": "assistant", "content": str(answer)}]
    return talk


def load_rules(module: str, *functions: str) -> ModuleType:
    """The module that --judge_module names. Raises SettingsError if it cannot be imported, or lacks a function."""
    rules = import_user_module(module, "judge_module")
    if not all(callable(getattr(rules, name, None)) for name in functions):
        needed = " and ".join(f"{name}()" for name in functions)
        raise SettingsError(f"--judge_module {module} is not a module with {needed}. Write one, as in recipes/demo.")
    return rules


def apply_rules(module: str, answers: AnswerSet, pairs: list[tuple[str, ...]]) -> Judgments:
    """Judge by `module`: compare(first, second, question) is "win", "tie" or "loss" for the second; in both orders. The
    scores are a model's means of what score(answer, question) returns, by field. Raises SettingsError if there is no
    such module, or if it fails or returns anything else."""
    rules, rows, scores = load_rules(module, "score", "compare"), list[Row](), dict[str, dict[str, float]]()
    texts = {model: {i: turns[0] for i, turns in by_id.items()} for model, by_id in answers.answers.items()}
    for question, (one, two) in itertools.product(answers.questions, pairs):
        first, second = (texts[model].get(question["question_id"]) for model in (one, two))
        if answers.is_same(question["question_id"], (one, two), 1):
            rows.append(tie_row(question, 1, (one, two), ["rules", module]))
        elif first is not None and second is not None:
            verdicts = [call_rules(rules, "compare", question, *both) for both in ((first, second), (second, first))]
            if unknown := [verdict for verdict in verdicts if verdict not in ("win", "tie", "loss")]:
                raise SettingsError(f"--judge_module {module}: compare() returns {printable(repr(unknown[0]))}. Return "
                                    '"win", "tie" or "loss" for the second answer.')  # fmt: skip
            winners = {"win": two, "loss": one}.get(verdicts[0]), {"win": one, "loss": two}.get(verdicts[1])
            calls = [{"winner": winner or "tie"} for winner in winners]
            rows.append(pair_row(question, 1, (one, two), ["rules", module], calls))
    for model, own in texts.items():
        each = [score_fields(rules, q, own[i]) for q in answers.questions if (i := q["question_id"]) in own]
        scores[model] = {name: fmean(fields[name] for fields in each) for name in each[0]} if each else {}
    if not rows:
        raise UserError(NOTHING_ANSWERED.format(" and ".join(pairs[0])))
    return Judgments(f"rules {module}", rows, scores)


class _Fields(dict[str, Any]):
    """A question whose missing fields raise MissingField: other errors of the rules are their own."""

    class MissingField(KeyError):
        pass

    def __missing__(self, key: str) -> Any:
        raise self.MissingField(key)


def call_rules(rules: ModuleType, function: str, question: Question, *texts: str) -> Any:
    """What a function of a module returns for answers to a question. Raises SettingsError where it fails."""
    flag = f"--judge_module {rules.__name__}"
    try:
        return getattr(rules, function)(*map(str, texts), _Fields({"prompt": question["turns"][0], **question}))
    except _Fields.MissingField as error:
        raise SettingsError(f"--judge_module {rules.__name__} needs a field {error} in every question. Add it to the "
                            "prompts, or use --judge_model NAME.") from None  # fmt: skip
    except Exception as error:
        at = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == rules.__file__]
        where = f" in line {at[-1].lineno}" if at else ""
        raise SettingsError(printable(
            f"{flag}: {function}() fails{where} on the answer {texts[0][:60]!r} to question {question['question_id']}: "
            f"{type(error).__name__}: {error}. Correct the module."
        )) from None  # fmt: skip


def score_fields(rules: ModuleType, question: Question, answer: str) -> dict[str, float]:
    """The fields of what a module's score() returns, or a number as the field "score". Raises SettingsError where it
    fails, or for anything else."""
    score = call_rules(rules, "score", question, answer)
    is_record = dataclasses.is_dataclass(score) and not isinstance(score, type)
    fields = {"score": math.nan}
    with contextlib.suppress(TypeError, ValueError):
        given = dataclasses.asdict(cast(Any, score)) if is_record else {"score": score}
        fields = {name: math.nan if isinstance(value, str) else float(value) for name, value in given.items()}
    if not all(map(math.isfinite, fields.values())):
        raise SettingsError(f"--judge_module {rules.__name__}: score() returns {printable(repr(score))}. Return a "
                            "finite number, or a dataclass of such numbers.")  # fmt: skip
    return fields


def score_by_rules(rules: ModuleType, question: Question, answer: Answer) -> float:
    """What a module's score() returns, as a number: each field counts twice as much as the next, in all at most 1."""
    values = score_fields(rules, question, answer).values()
    weights = [2.0**-k for k in range(len(values))]
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


class RewardJudge(Judge):
    """A reward model: of two answers, the one with the higher score wins. Each turn that both models of a pair have
    answered is compared. Scores are stored in scores.jsonl as they come."""

    def __init__(self, settings: Any, answers: AnswerSet, pairs: list[tuple[str, ...]]) -> None:
        self.reward = RewardModel(settings.reward_model, settings.quantization)
        self.matches = [
            (question, turn, pair) for question in answers.questions for pair in pairs
            for turn in range(1, 1 + min(len(answers.answers[m].get(question["question_id"], ())) for m in pair))
        ]  # fmt: skip
        if not self.matches:
            raise UserError(NOTHING_ANSWERED.format(" and ".join(pairs[0])))
        super().__init__(Judgments(f"reward model {self.reward.name}", []), answers, pairs, self.reward.fingerprint)

    def _preview(self) -> list[str]:
        return [f"The answers to {len(self.answers.questions):,} questions, by {self.name}."]

    def run(self, run: Run) -> Judgments:
        from tqdm.auto import tqdm

        super().run(run)
        reward, answers, rows = self.reward, self.answers, list[Row]()
        asked = {(m, q["question_id"], turn): (q, answers.answers[m][q["question_id"]][:turn])
                 for q, turn, pair in self.matches for m in pair}  # fmt: skip
        with resumable(run):
            store = JsonlStore(run.folder / "scores.jsonl", lambda row: (row["model"], row["question_id"], row["turn"]))
            missing = [key for key in asked if key not in store.rows]
            missing.sort(key=lambda key: -len(str(conversation(*asked[key]))))
            for start in tqdm(range(0, len(missing), reward.batch_size), desc=reward.name, unit="batch"):
                keys = missing[start : start + reward.batch_size]
                scored = zip(keys, reward.score_answers([asked[key] for key in keys]), strict=True)
                store.add(*({"model": m, "question_id": i, "turn": t, "score": score} for (m, i, t), score in scored))
        for question, turn, pair in self.matches:
            if answers.is_same(question["question_id"], pair, turn):
                rows.append(tie_row(question, turn, pair, ["reward model", reward.name]))
                continue
            scores = [store.rows[model, question["question_id"], turn]["score"] for model in pair]
            is_tie = math.isclose(*scores, rel_tol=1e-6, abs_tol=1e-6)  # the same text in batches of other widths
            calls = [{"winner": "tie" if is_tie else pair[scores[1] > scores[0]]}] * 2
            rows.append(pair_row(question, turn, pair, ["reward model", reward.name], calls) | {"scores": scores})
        of_models = {name: [r["score"] for r in store.rows.values() if r["model"] == name] for name in answers.answers}
        means = ", ".join(f"{name} {fmean(scores):.3f}" for name, scores in of_models.items() if scores)
        return Judgments(self.name, rows, notes=[*self.judgments.notes, f"Mean score: {means}."])
