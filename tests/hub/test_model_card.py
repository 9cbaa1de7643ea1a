"""The model card: facts of a run and the runs that it started from, in the Hub's own format."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from helpers.core import UserError
from helpers.hub.push import write_card

MERGED = {"kl": 1e-6, "top1": 1.0, "max_abs": 0.1, "mean_abs": 0.01}


def test_a_card_names_the_base_at_the_root_of_a_lineage_of_local_folders(tmp_path: Path) -> None:
    from helpers.evaluation.judgments import AnswerSet, Judgments, pair_row
    from helpers.evaluation.results import PairwiseResults

    common = {"base_model": "org/base", "versions": {"trl": "1.16.0"}, "status": "finished"}
    data = {"read": 10, "kept": 8, "dropped": 2, "train": 6, "eval": 2}
    settings = {"dataset_id": ["org/talks"], "dataset_revision": "abc", "revision": "v2", "learning_rate": 1e-5}
    dpo = {"dpo_beta": 0.2, "loss_type": ["ipo"], "dataset_id": ["org/pairs", "mine.jsonl"], "max_steps": 7}
    runs: dict[str, dict[str, Any]] = {
        "sft": {"settings": settings, "data": data, "sources": {}},
        "dpo": {"settings": dpo, "sources": {"max_steps": "flag"}, "data": data, "metrics": {"eval_loss": 0.5}},
        "merge": {"settings": {}, "metrics": MERGED},
    }
    parent = None
    for step, record in runs.items():
        (tmp_path / step).mkdir()
        record |= common | {"step": step, "parent_folder": parent}
        (tmp_path / step / "run.json").write_text(json.dumps(record))
        parent = str(tmp_path / step)
    (tmp_path / "dpo" / "adapter_config.json").write_text("{}")
    (tmp_path / "judge").mkdir()
    rows = [
        pair_row({"question_id": i}, 1, ("sft", "dpo"), ["/srv/models/gpt", "pair"], [{"winner": w}] * 2)
        for i, w in enumerate(["dpo"] * 5 + ["tie"] * 2 + ["sft"])
    ]
    judgments = Judgments("/srv/models/gpt", rows, notes=["/srv/models/gpt is slow."])
    verdict = PairwiseResults.from_judgments(judgments, AnswerSet([], {})).as_dict()
    (tmp_path / "judge" / "run.json").write_text(
        json.dumps({"step": "judge", "status": "finished", "metrics": verdict})
    )
    text = write_card(tmp_path / "merge", "me/x", "mit")
    card = ModelCard(text)
    assert (card.data.base_model, card.data.base_model_relation, card.data.license) == ("org/base", "merge", "mit")
    assert card.data.datasets == ["org/pairs", "org/talks"]
    assert "[org/base](https://huggingface.co/org/base) at revision `v2`: instruction-tuned, then aligned" in text
    assert "with β = 0.2 and the ipo loss." in text
    assert "Data: org/pairs, mine.jsonl.\n10 rows were read, 8 kept and 2 dropped.\n6 were used for training" in text
    assert "Data: org/talks at revision `abc`" in text
    assert "| max_steps | 7 |" in text
    assert "KL 1.00e-06 nats" in text
    assert "Compared with sft on the same prompts, judged by gpt." in text
    assert re.search(r"\| 5 \| 1 \| 2 \| 75.0% \| \d+\.\d% to \d+\.\d% \|", text)
    assert str(tmp_path) not in text
    assert "/srv" not in text
    assert ModelCard(write_card(tmp_path / "dpo", "me/x")).data.base_model_relation == "adapter"
    assert ModelCard(write_card(tmp_path / "sft", "me/x")).data.base_model_relation == "finetune"


def test_a_card_names_no_unknown_base_and_no_local_folder(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": null}')
    assert "None" not in write_card(tmp_path, "me/x")
    record = {"step": "dpo", "base_model": "org/base", "versions": {}, "metrics": {"eval_loss": float("nan")}}
    record["settings"] = {"dpo_beta": 0.1, "loss_type": ["sigmoid"], "deepspeed": "/data/me/zero3.json"}
    (tmp_path / "run.json").write_text(json.dumps(record | {"sources": {"deepspeed": "flag"}}))
    text = write_card(tmp_path, "me/x")
    assert "| deepspeed | zero3.json |" in text
    assert ModelCard(text).data.eval_results is None


def test_an_invalid_card_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = tmp_path / "broken.jinja"
    template.write_text("---\n- a list\n---\n")
    monkeypatch.setattr("helpers.hub.push.TEMPLATE", template)
    with pytest.raises(UserError, match="The card of me/x is not valid for the Hub: "):
        write_card(tmp_path, "me/x")


NAMES = ["a|b", "<img src=x onerror=alert(1)>", "`rm -rf`", "[x](javascript:alert(1))", "*a* _b_ ~~c~~",
         "two\nlines # x", "---", 'quote " and \' and: colon', "{{ 7 * 7 }}", "$x$ \\(y\\)"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_are_shown_as_they_are(name: str, tmp_path: Path) -> None:
    from html import unescape

    dpo = {"dpo_beta": 0.1, "loss_type": [name], "dataset_id": [f"/data/anna/{name.replace('/', '')}.jsonl"]}
    dpo |= {"revision": name, "dataset_revision": name, "chat_template": name, "adapter_dtype": {"a": "/home/anna/x/y"}}
    record = {"step": "dpo", "base_model": "org/base", "versions": {name: name}, "settings": dpo, "status": "finished",
              "sources": {"chat_template": "flag", "adapter_dtype": "flag"}, "metrics": {"eval_loss": 0.5},
              "plan": {"weights": name, "quantization": name, "computed in": name}}  # fmt: skip
    (tmp_path / "dpo").mkdir()
    (tmp_path / "dpo" / "run.json").write_text(json.dumps(record))
    (tmp_path / "judge").mkdir()
    pair = {"baseline": name, "candidate": "dpo", "win": 1, "loss": 1, "tie": 1, "win_rate_adjusted": 0.5}
    metrics = {"judge": "/home/anna/judgments/gpt.jsonl", "pairs": [pair | {"interval": [0, 1], "notes": [name]}]}
    verdict = {"step": "judge", "status": "finished", "metrics": metrics}
    (tmp_path / "judge" / "run.json").write_text(json.dumps(verdict))
    text = write_card(tmp_path / "dpo", "me/x", "mit")
    body = text.split("\n---\n", 1)[1]
    assert ModelCard(text).data.base_model == "org/base"
    assert "anna" not in text
    assert "<img" not in re.sub("`[^`]*`", "", body)
    for line in (line for line in body.splitlines() if line.startswith("| chat_template |")):
        assert len(re.findall(r"(?<!\\)\|", line)) == 3
        shown = unescape(re.sub(r"\\([\W_])", r"\1", line.removeprefix("| chat_template | ").removesuffix(" |")))
        assert shown == " ".join(name.split())
    assert "judged by …/gpt.jsonl" in body or "judged by gpt.jsonl" in body
    assert not re.search(
        r"(?<!\\)[*`\[]", re.sub(r"`[^`]*`|\]\(https://\S+\)|\[(DPO|org/base)", "", body.split("```")[-1])
    )


def test_a_card_has_no_result_of_a_model_that_it_was_trained_from(tmp_path: Path) -> None:
    from helpers.evaluation.judgments import AnswerSet, Judgments, pair_row
    from helpers.evaluation.results import PairwiseResults

    parent = None
    for order, (name, step) in enumerate((("dpo-1", "dpo"), ("dpo-2", "dpo"), ("merged", "merge")), 1):
        record = {"base_model": "org/base", "versions": {}, "status": "finished", "sources": {}, "step": step}
        record |= {"order": order, "fingerprint": name, "finished": f"2026-11-0{order}", "parent_folder": parent}
        record |= {"settings": {"dpo_beta": 0.1, "loss_type": ["sigmoid"]}, "metrics": MERGED | {"eval_loss": 0.5}}
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(record))
        (tmp_path / name / "adapter_config.json").write_text("{}")
        parent = str(tmp_path / name)

    def judge(order: int, wins: dict[str, str]) -> None:
        winners = {"new": lambda name: name, "old": lambda name: "base"}
        rows = [
            pair_row({"question_id": i}, 1, ("base", name), ["gpt", "pair"], [{"winner": winners[side](name)}] * 2)
            for name, sides in wins.items() for i, side in enumerate(sides.split())
        ]  # fmt: skip
        metrics = PairwiseResults.from_judgments(Judgments("gpt", rows), AnswerSet([], {})).as_dict()
        record = {"step": "judge", "status": "finished", "order": order, "finished": "2026-11-09", "metrics": metrics}
        record["weights"] = {name: name for name in wins}
        (tmp_path / f"judge-{order}").mkdir()
        (tmp_path / f"judge-{order}" / "run.json").write_text(json.dumps(record))

    judge(4, {"dpo-1": "new new new new old"})
    assert "80.0%" in write_card(tmp_path / "dpo-1", "me/dpo-1")
    for name in ("dpo-2", "merged"):
        assert "80.0%" not in write_card(tmp_path / name, f"me/{name}")
    judge(5, {"dpo-1": "new new new new old", "dpo-2": "old old old new old"})
    for name in ("dpo-2", "merged"):
        card = write_card(tmp_path / name, f"me/{name}")
        assert re.findall(r"\| ([\d.]+%) \|", card)[:1] == ["20.0%"], card
