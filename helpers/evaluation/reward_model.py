"""Reward models: classifiers with one logit, which score a conversation with its answer (transformers 5.23)."""

from __future__ import annotations

import functools
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.core import Row, UserError, printable
from helpers.data.formats import row_template_options
from helpers.data.messages import Message
from helpers.evaluation.answers import JsonlStore
from helpers.evaluation.judgments import AnswerSet, pair_row, tie_row
from helpers.evaluation.questions import NOTHING_ANSWERED, Question
from helpers.models.adapters import display_name, load_adapter, read_pretrained
from helpers.models.chat import TemplateOptions, fold_system_message, render, supports_system_role, tokenize
from helpers.models.plan import plan_model, prepare_model
from helpers.models.resolve import ModelRef, fetch_file, resolve_adapter, resolve_model

if TYPE_CHECKING:
    from helpers.models.plan import LoadPlan

SCORER_NEEDED = "Use a model that was trained with one score, such as those of TRL's RewardTrainer."


class RewardModel:
    """A classifier with one logit: a Hub id, a folder, or a LoRA adapter of one. It is loaded when it first scores.

    `quantization` is "4bit", "8bit" or "none". Raises UserError for a model that has no such logit or chat template.
    """

    def __init__(self, name: str, quantization: str = "none", batch_size: int = 8, remote_code: bool = False) -> None:
        from transformers import AutoConfig, AutoTokenizer

        self.name, self.quantization, self.batch_size = display_name(name), quantization, batch_size
        self.ref = _find_model(name)
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
            raise UserError(f"{self.name} is without a chat template. {SCORER_NEEDED}")
        self._has_system_role = supports_system_role(self.tokenizer)

    @property
    def fingerprint(self) -> str:
        """Identifies the weights, and how they are loaded."""
        return f"{self.ref.fingerprint}-{self.quantization}"

    @functools.cached_property
    def plan(self) -> LoadPlan:
        """How it is loaded on this machine."""
        return plan_model(self.ref.base, "none", self.quantization, task="SEQUENCE_CLASSIFICATION")

    def score(
        self, conversations: Sequence[list[Message]], options: Sequence[TemplateOptions] | None = None
    ) -> list[float]:
        """The logit of each conversation, equal to that of the model alone on it, in batches of similar length.

        Args:
            conversations: Each a prompt and its answer, as messages.
            options: For each conversation, what its template is given besides, such as tools.

        Raises:
            UserError: A conversation is longer than the model takes, or a score is not a number.
        """
        import torch

        talks = [fold_system_message(talk, self._has_system_role) for talk in conversations]
        texts = [render(self.tokenizer, t, options=o) for t, o in zip(talks, options or [{}] * len(talks), strict=True)]
        rows = tokenize(self.tokenizer, texts)
        text_config, most = self.config.get_text_config(), max(map(len, rows), default=0)
        limit = getattr(text_config, "max_position_embeddings", None) or most
        if most > limit:
            raise UserError(f"A conversation has {most:,} tokens, and {self.name} takes {limit:,}. Leave it out.")
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
        width, known, used = max(map(len, rows)), self._padding, {i for row in rows for i in row}
        pad = known if known is not None else next(i for i in range(len(used) + 1) if i not in used)
        config.pad_token_id = pad  # the model refuses batches without it; any id that no row has will do
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=self.model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.model.device)
        return [float(logit) for logit in self.model(input_ids=ids, attention_mask=mask).logits[:, 0].float()]

    @functools.cached_property
    def model(self) -> Any:
        """The loaded model. Raises UserError if its files lack the head, which would be drawn at random."""
        from peft.utils import load_peft_weights
        from transformers import AutoModelForSequenceClassification

        ref, quantization = self.ref, self.plan.quantization
        options = {name: getattr(self.plan, name) for name in ("dtype", "attn_implementation", "device_map")}
        model, found = AutoModelForSequenceClassification.from_pretrained(
            ref.base, config=self.config, quantization_config=quantization, output_loading_info=True,
            **options, **self._options,
        )  # fmt: skip
        own = load_peft_weights(ref.adapter, device="cpu") if ref.adapter else {}
        for name in found["missing_keys"]:
            if not name.startswith(f"{model.base_model_prefix}."):
                saved = next((weight for key, weight in own.items() if key.endswith(f".{name}")), None)
                if saved is None:
                    raise UserError(f"{self.name} is without weights of its head ({name}). {SCORER_NEEDED}")
                if len(saved) != 1:
                    raise UserError(f"{self.name} is an adapter with {len(saved)} labels, not 1. {SCORER_NEEDED}")
                model.get_parameter(name)._is_hf_initialized = True  # load_adapter will fill it
        prepare_model(model, self.tokenizer, ref.adapter)
        if ref.adapter:
            model = load_adapter(model, ref.adapter)
        return model.eval()

    @functools.cached_property
    def _padding(self) -> int | None:
        """The padding token that the model was trained with, if it has a row in the embeddings."""
        pad = self.model.config.get_text_config().pad_token_id
        return pad if pad is not None and 0 <= pad < self.model.get_input_embeddings().num_embeddings else None


def _find_model(name: str) -> ModelRef:
    """The model or adapter that a name means. Raises UserError."""
    try:
        fetch_file(name, None, "adapter_config.json")
    except UserError:  # a model
        return ModelRef(name, resolve_model(name))
    return resolve_adapter(name)


def judge_by_scores(
    reward: RewardModel, answers: AnswerSet, pairs: Sequence[tuple[str, ...]], file: Path
) -> tuple[list[Row], str]:
    """Rows of pairwise judgments, in which the answer with the higher score wins, and the mean scores in words.

    Each turn that both models of a pair have answered is compared. Scores are stored in `file` as they are computed.
    """
    from tqdm.auto import tqdm

    matches = [
        (question, turn, pair) for question in answers.questions for pair in pairs
        for turn in range(1, 1 + min(len(answers.answers[m].get(question["question_id"], ())) for m in pair))
    ]  # fmt: skip
    if not matches:
        raise UserError(NOTHING_ANSWERED.format(" and ".join(pairs[0])))
    store = JsonlStore(file, lambda row: (row["model"], row["question_id"], row["turn"]))
    options = {q["question_id"]: row_template_options(q) for q in answers.questions}
    talks = {(m, q["question_id"], t): _conversation(q, answers.answers[m][q["question_id"]][:t])
             for q, t, pair in matches for m in pair}  # fmt: skip
    missing = sorted(talks.keys() - store.rows.keys(), key=lambda key: (-len(str(talks[key])), str(key)))
    for start in tqdm(range(0, len(missing), reward.batch_size), desc=reward.name, unit="batch"):
        keys = missing[start : start + reward.batch_size]
        scores = reward.score([talks[key] for key in keys], [options[key[1]] for key in keys])
        scored = zip(keys, scores, strict=True)
        store.add(*({"model": m, "question_id": i, "turn": t, "score": score} for (m, i, t), score in scored))
    rows, judge, by_model = list[Row](), ["reward model", reward.name], defaultdict[str, list[float]](list)
    for question, turn, pair in matches:
        scores = [store.rows[model, question["question_id"], turn]["score"] for model in pair]
        if answers.is_same(question["question_id"], pair, turn):
            rows.append(tie_row(question, turn, pair, judge))
        else:
            is_tie = math.isclose(*scores, rel_tol=1e-6, abs_tol=1e-6)  # the same text in batches of other widths
            winner = "tie" if is_tie else pair[scores[1] > scores[0]]
            rows.append(pair_row(question, turn, pair, judge, [{"winner": winner}] * 2) | {"scores": scores})
    for row in store.rows.values():
        by_model[row["model"]].append(row["score"])
    means = [f"{name} {statistics.fmean(by_model[name]):.3f}" for name in answers.answers if name in by_model]
    return rows, f"Mean score: {', '.join(means)}."


def _conversation(question: Question, answers: list[str]) -> list[Message]:
    """A question's turns with the answers to them."""
    talk: list[Message] = [{"role": "system", "content": question["system"]}] if question.get("system") else []
    for asked, answer in zip(question["turns"], answers, strict=False):
        talk += [{"role": "user", "content": asked}, {"role": "assistant", "content": str(answer)}]
    return talk
