"""Reward models: every score is the model's on that conversation alone, and what cannot score is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from helpers.core import SettingsError, UserError, read_jsonl
from helpers.evaluation.judges import make_judge
from helpers.evaluation.judgments import AnswerSet
from helpers.evaluation.results import PairwiseResults
from helpers.evaluation.verdicts import RewardModel
from helpers.runs.run import Run
from tests.evaluation.judging import settings_for
from tests.families import FAMILIES, SHAPE

Talk = list[dict[str, Any]]


def talk(words: int, system: str = "") -> Talk:
    """A conversation whose answer has so many words."""
    asked: Talk = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": "Add 2 and 3."}]
    return [
        *asked,
        {"role": "assistant", "content": " ".join(["five is it", "and so on"][i % 2] for i in range(words))},
    ]


TALKS = [talk(words) for words in (1, 9, 4, 23, 2, 16, 1)] + [talk(5, "Be short.")]


def write_model(folder: Path, tokenizer: PreTrainedTokenizerBase, kind: str = "llama", **given: Any) -> Path:
    """A classifier with random weights; `given` are values of its config."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SHAPE | {"vocab_size": len(tokenizer), "num_labels": 1} | given)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def scores_alone(model: Any, tokenizer: Any, talks: list[Talk] = TALKS) -> list[float]:
    """A plain loop over conversations, as model cards show it."""
    with torch.inference_mode():
        rows = [tokenizer.apply_chat_template(each, return_tensors="pt", return_dict=True) for each in talks]
        return [model(**row).logits[0, 0].item() for row in rows]


def load(folder: Path) -> tuple[Any, Any]:
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def short_is_better(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model trained on pairs of a short and a long answer (Bradley and Terry)."""
    folder = write_model(tmp_path_factory.mktemp("short") / "reward", tokenizer, pad_token_id=tokenizer.pad_token_id)
    model, own = load(folder)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    draw = torch.Generator().manual_seed(0)
    for _ in range(60):
        short, more = (int(n) for n in torch.randint(1, 12, (2,), generator=draw))
        pair = [own.apply_chat_template(talk(n), return_tensors="pt", return_dict=True) for n in (short, short + more)]
        chosen, rejected = (model(**row).logits[0, 0] for row in pair)
        loss = -torch.nn.functional.logsigmoid(chosen - rejected)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def test_a_trained_one_scores_as_a_plain_loop_alone_and_padded_on_either_side(short_is_better: Path) -> None:
    model, own = load(short_is_better)
    expected = scores_alone(model, own)
    by_words = [score for _, score in sorted(zip((1, 9, 4, 23, 2, 16), expected, strict=False))][:5]
    assert by_words == sorted(by_words, reverse=True)
    assert by_words[0] - by_words[-1] > 1
    assert RewardModel(str(short_is_better)).score(TALKS) == pytest.approx(expected, abs=1e-5)
    for side in ("left", "right"):
        texts = [own.apply_chat_template(each, tokenize=False) for each in TALKS]
        batch = own(texts, add_special_tokens=False, padding=True, padding_side=side, return_tensors="pt")
        with torch.inference_mode():
            plain = model(**batch).logits[:, 0].tolist()
        assert RewardModel(str(short_is_better), batch_size=3).score(TALKS) == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("pad", ["own", "eos", "none", "-1"])
def test_scores_do_not_depend_on_batches_or_the_padding_token(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, pad: str, size: int
) -> None:
    ids = {"own": tokenizer.pad_token_id, "eos": tokenizer.eos_token_id, "none": None, "-1": -1}
    folder = write_model(tmp_path / "reward", tokenizer, pad_token_id=ids[pad])
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"padding_side": "left" if size == 3 else "right"}
    config |= {"pad_token": None} if pad == "none" else {"pad_token": config["eos_token"]} if pad == "eos" else {}
    file.write_text(json.dumps(config))
    model, own = load(folder)
    model.config.pad_token_id = None if pad == "-1" else ids[pad]
    expected = scores_alone(model, own)
    assert len({round(score, 4) for score in expected}) == len(TALKS) - 1  # two are the same
    assert RewardModel(str(folder), batch_size=size).score(TALKS) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "gemma3_text", "mistral", "bert"])
def test_each_kind_of_model_scores_as_alone(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, kind: str) -> None:
    shape = next((more for k, _, more in FAMILIES.values() if k == kind), {})
    folder = write_model(tmp_path / kind, tokenizer, kind, **shape, pad_token_id=tokenizer.pad_token_id)
    expected = scores_alone(*load(folder))
    assert RewardModel(str(folder), batch_size=4).score(TALKS) == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 1e-3


def test_tools_and_variables_of_a_conversation_reach_the_template(short_is_better: Path, tmp_path: Path) -> None:
    model, own = load(short_is_better)
    own.chat_template = own.chat_template + "{% if tools %}{{ tools[0].name }}{% endif %}{{ mode }}"
    model.save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    options: list[dict[str, Any]] = [{"tools": [{"name": "add"}]}, {"mode": "so"}]
    rows = [own.apply_chat_template(TALKS[0], return_tensors="pt", return_dict=True, **more) for more in options]
    with torch.inference_mode():
        expected = [model(**row).logits[0, 0].item() for row in rows]
    assert RewardModel(str(tmp_path)).score([TALKS[0]] * 2, options) == pytest.approx(expected, abs=1e-5)


def test_four_bits_where_asked(short_is_better: Path) -> None:
    reward = RewardModel(str(short_is_better), "4bit")
    full, scores = RewardModel(str(short_is_better)).score(TALKS), reward.score(TALKS)
    assert scores == pytest.approx([reward.score([each])[0] for each in TALKS], abs=1e-5)
    assert type(reward.model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert type(reward.model.score).__name__ == "Linear"
    assert scores != pytest.approx(full, abs=1e-5)
    assert reward.fingerprint != RewardModel(str(short_is_better)).fingerprint


def test_another_chat_template_is_another_reward_model(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    folder = write_model(tmp_path, tokenizer)
    before = RewardModel(str(folder)).fingerprint
    assert RewardModel(str(folder)).fingerprint == before
    (template,) = folder.glob("*.jinja")
    template.write_text(template.read_text() + " ")
    assert RewardModel(str(folder)).fingerprint != before


@pytest.fixture
def adapter(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    """A LoRA adapter with its head, on a language model."""
    config = AutoConfig.for_model("llama", **SHAPE | {"vocab_size": len(tokenizer)})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    policy = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.3 * torch.randn(weight.shape) * weight.requires_grad
    policy.save_pretrained(str(tmp_path / "adapter"))
    (tmp_path / "expected.json").write_text(json.dumps(scores_alone(policy.eval(), tokenizer)))
    return tmp_path / "adapter"


def test_an_adapter_scores_with_its_head(adapter: Path) -> None:
    expected = json.loads((adapter.parent / "expected.json").read_text())
    assert RewardModel(str(adapter), batch_size=4).score(TALKS) == pytest.approx(expected, abs=1e-5)


def test_an_adapter_without_a_head_is_refused(adapter: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = adapter / "adapter_model.safetensors"
    save_file({name: weight for name, weight in load_file(file).items() if "score" not in name}, file)
    with pytest.raises(UserError, match=r"adapter has no weights for its head \(score.weight\)\. Use a model"):
        RewardModel(str(adapter)).score(TALKS)


def test_what_has_no_single_score_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "three", tokenizer, num_labels=3)
    with pytest.raises(UserError, match=r"three is a classifier with 3 labels, not a reward model. Use a model that"):
        RewardModel(str(folder))
    config = AutoConfig.for_model("llama", **SHAPE | {"vocab_size": len(tokenizer)})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    with pytest.raises(UserError, match=r"lm is no classifier \(LlamaForCausalLM\), not a reward model. Use a model"):
        RewardModel(str(tmp_path / "lm"))
    file = tmp_path / "lm" / "config.json"  # a head that is only announced would be drawn at random
    file.write_text(json.dumps(json.loads(file.read_text()) | {"id2label": {"0": "LABEL_0"}, "label2id": {}}))
    with pytest.raises(UserError, match=r"lm has no weights for its head \(score.weight\)\. Use a model that"):
        RewardModel(str(tmp_path / "lm")).score(TALKS)
    plain = write_model(tmp_path / "plain", tokenizer)
    (plain / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"plain has no chat template. Use a model that was trained"):
        RewardModel(str(plain))
    with pytest.raises(UserError, match=r"'no/where' cannot be loaded|'no/where' is neither"):
        RewardModel("no/where")


def test_a_conversation_that_is_too_long_and_a_score_that_is_no_number_are_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "short", tokenizer, "gpt2", n_positions=32, max_position_embeddings=32)
    with pytest.raises(UserError, match=r"A conversation has [\d,]+ tokens, and .*short takes 32. Leave it out."):
        RewardModel(str(folder)).score(TALKS)
    reward = RewardModel(str(write_model(tmp_path / "nan", tokenizer)))
    with torch.no_grad():
        reward.model.score.weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"scores of .*nan contain NaN or Inf \(8 of 8, the first for "):
        reward.score(TALKS)


def judged_by(model: Path, answers: AnswerSet, folder: Path) -> tuple[Any, list[dict[str, Any]]]:
    judge = make_judge(settings_for(folder, judge_model="", reward_model=str(model)), answers)
    return judge, judge.run(Run(folder, {})).rows


@pytest.fixture
def answers() -> AnswerSet:
    """Four questions, one of them of two turns: a is shorter twice, b once, they are the same once, or b has none."""
    questions = [{"question_id": i, "category": "general", "turns": ["Add 2 and 3."]} for i in range(5)]
    questions[1] |= {"turns": ["Add 2 and 3.", "And 4."], "system": "Be short."}
    five = [" ".join(["five"] * words) for words in range(30)]
    a = {0: [five[1]], 1: [five[2], five[20]], 2: [five[3]], 3: [five[4]], 4: [five[1]]}
    b = {0: [five[9]], 1: [five[18], five[1]], 2: [five[1]], 3: [five[4]]}
    return AnswerSet(questions, {"a": a, "b": b})


def test_as_a_judge_the_higher_score_wins_and_every_score_is_a_plain_loop_s(
    short_is_better: Path, answers: AnswerSet, tmp_path: Path
) -> None:
    judge, rows = judged_by(short_is_better, answers, tmp_path / "run")
    model, own = load(short_is_better)
    scores = {(r["model"], r["question_id"], r["turn"]): r["score"] for r in read_jsonl(tmp_path / "run/scores.jsonl")}
    for (name, i, turn), score in scores.items():
        question, texts = answers.questions[i], answers.answers[name][i]
        talked: Talk = [{"role": "system", "content": "Be short."}] if i == 1 else []
        for asked, text in zip(question["turns"][:turn], texts, strict=False):
            talked += [{"role": "user", "content": asked}, {"role": "assistant", "content": text}]
        assert [score] == pytest.approx(scores_alone(model, own, [talked]), abs=1e-5)
    assert len(scores) == 10  # of the models, questions and turns that are compared
    assert [(row["question_id"], row["turn"], row["g1_winner"], row["g2_winner"]) for row in rows][::3] == [
        (0, 1, "model_1", "model_1"), (2, 1, "model_2", "model_2"),
    ]  # fmt: skip
    for row in rows:
        one, two = (scores[row[side], row["question_id"], row["turn"]] for side in ("model_1", "model_2"))
        assert row["g1_winner"] == ("tie" if row["question_id"] == 3 else "model_1" if one > two else "model_2")
    assert [row["question_id"] for row in rows if row.get("identical")] == [3]
    judgments = judge.run(Run(tmp_path / "run", {}))
    results = PairwiseResults.from_judgments(judgments, answers)
    assert results.judge == f"reward model {short_is_better}"
    assert results.pairs[0].consistency is None  # there is no order
    assert results.pairs[0].counts.total == 5
    means = [sum(s for (n, _, _), s in scores.items() if n == name) / 5 for name in "ab"]
    assert f"Mean score: a {means[0]:.3f}, b {means[1]:.3f}." in results.notes()


def test_a_stopped_judge_scores_only_what_is_left(
    short_is_better: Path, answers: AnswerSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, expected = judged_by(short_is_better, answers, tmp_path / "whole")
    kept = (tmp_path / "whole" / "scores.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped" / "scores.jsonl").write_text("".join(kept[:6]) + kept[6][:20])
    scored: list[int] = []
    score = RewardModel.score

    def count(self: RewardModel, talks: Any, options: Any) -> list[float]:
        scored.append(len(talks))
        return score(self, talks, options)

    monkeypatch.setattr(RewardModel, "score", count)
    _, rows = judged_by(short_is_better, answers, tmp_path / "stopped")
    assert sum(scored) == 4
    for row, other in zip(rows, expected, strict=True):
        assert row.get("scores", []) == pytest.approx(other.get("scores", []), abs=1e-5)
        assert row["g1_winner"] == other["g1_winner"]


def test_a_reward_model_does_not_rate_and_needs_answers_to_compare(
    short_is_better: Path, answers: AnswerSet, tmp_path: Path
) -> None:
    given = {"judge_model": "", "reward_model": str(short_is_better)}
    with pytest.raises(SettingsError, match="--mode single rates answers from 1 to 10; --reward_model compares them"):
        make_judge(settings_for(tmp_path, mode="single", **given), answers)
    nothing = AnswerSet(answers.questions, {"a": {0: ["x"]}, "b": {}})
    with pytest.raises(UserError, match=r"Nothing to judge: no question has answers of all of a and b\. Run 04"):
        make_judge(settings_for(tmp_path / "run", **given), nothing).run(Run(tmp_path / "run", {}))
