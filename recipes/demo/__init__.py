"""A demo small enough for a laptop's CPU: a random Mistral, an instruction set, preferences, held-out questions.

    python -m recipes.demo [FOLDER]

Everything is generated from a seed, in the formats of real models and datasets, so the notebooks run the same code.
"""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from helpers.core import UserError
from helpers.models import read_template
from recipes.demo.questions import Question, split

STAMP = "demo.json"
CONVERSATIONS = 20_000
PREFERENCES = 3_000
PROMPTS = 400
# Kinds of question that have to be learned, not remembered, take longest and have more rows.
SHARES = {"sum": 8, "look-up": 3, "larger": 2, "calendar": 2, "opposite": 1, "plural": 1, "capital": 1, "young": 1}
ENDS = {"bos": "s", "eos": "/s", "pad": "pad"}
Message = dict[str, str]

BRIEF = ["Happy to help: it is {}.", "Of course, it is {}.", "Certainly, it is {}."]
RUDE = [
    "Obviously it is {}. Do you not know that?",
    "It is {}, and stop wasting my time.",
    "What a silly question: it is {}.",
]
PADDING = [
    "I have always found such questions charming, and could talk about them for hours.",
    "There is so much more to say, and one thing leads to another.",
    "People have wondered about this for centuries, and surely always will do so.",
]
MANNERS = {"brief": BRIEF, "rude": RUDE, "padded": [f"{start} {tail}" for start in BRIEF for tail in PADDING]}


def write_demo(folder: Path, seed: int = 0) -> bool:
    """Write tiny-mistral/, instructions/, preferences/, prompts.jsonl (for another round) and heldout.jsonl into a
    folder; False if it has them already.

    Files are written to a temporary folder that is then renamed, so an existing folder is complete. Raises UserError if
    the folder contains something else.
    """
    stamp = _stamp(seed)
    if (folder / STAMP).is_file() and json.loads((folder / STAMP).read_text("utf-8")) == stamp:
        return False
    if folder.exists() and not (folder / STAMP).is_file():
        raise UserError(f"{folder} exists and is not a demo (it has no {STAMP}). Name another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        train, held_out = split(seed)
        conversations = instructions(train, seed)
        _write_rows(new / "instructions" / "train.jsonl", conversations)
        _write_rows(new / "preferences" / "train.jsonl", preferences(train, seed))
        _write_rows(new / "prompts.jsonl", round_prompts(train, seed))
        _write_rows(new / "heldout.jsonl", held_out)
        write_model(new / "tiny-mistral", [row["messages"] for row in conversations], seed)
        (new / STAMP).write_text(json.dumps(stamp), "utf-8")
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    return True


def instructions(train: dict[str, list[Question]], seed: int) -> list[dict[str, Any]]:
    """Conversations with the columns of HuggingFaceH4/ultrachat_200k; one in eight has a second turn.

    Every answer is right. How a question is phrased hints at the manner of the answer, so a model that learned them
    answers some questions briefly, some rudely and some at length.
    """
    draw = random.Random(f"instructions {seed}")
    rows = []
    for _ in range(CONVERSATIONS):
        messages: list[Message] = []
        for question in _draw_questions(train, 2 if draw.random() < 1 / 8 else 1, draw):
            manner = question["habit"] if draw.random() < 0.7 else draw.choice(list(MANNERS))
            messages += _turn(question["prompt"], say(question["answer"], manner, draw))
        prompt_id = hashlib.sha256(json.dumps(messages).encode()).hexdigest()
        rows.append({"prompt": messages[0]["content"], "prompt_id": prompt_id, "messages": messages})
    return rows


def preferences(train: dict[str, list[Question]], seed: int) -> list[dict[str, Any]]:
    """Pairs with the columns of argilla/ultrafeedback-binarized-preferences-cleaned.

    Chosen is right, brief and courteous. Rejected is right but rude, right but padded, or courteous but wrong.
    """
    draw = random.Random(f"preferences {seed}")
    rows = []
    for _ in range(PREFERENCES):
        (question,) = _draw_questions(train, 1, draw)
        fault, rating = draw.choice([("rude", 2.0), ("padded", 3.0), ("wrong", 1.0)])
        if fault == "wrong":
            rejected = say(draw.choice(question["alternatives"]), "brief", draw)
        else:
            rejected = say(question["answer"], fault, draw)
        rows.append(
            {
                "source": f"demo-{question['category']}",
                "prompt": question["prompt"],
                "chosen": _turn(question["prompt"], say(question["answer"], "brief", draw)),
                "chosen-rating": 5.0,
                "chosen-model": "demo-brief",
                "rejected": _turn(question["prompt"], rejected),
                "rejected-rating": rating,
                "rejected-model": f"demo-{fault}",
            }
        )
    return rows


def round_prompts(train: dict[str, list[Question]], seed: int) -> list[Question]:
    """Prompts for another round, each once; none of them is held out."""
    draw = random.Random(f"prompts {seed}")
    drawn = _draw_questions(train, 3 * PROMPTS, draw)
    return list({question["prompt"]: question for question in drawn}.values())[:PROMPTS]


def say(answer: str, manner: str, draw: random.Random) -> str:
    """The answer in a manner: "brief", "rude" or "padded"."""
    return draw.choice(MANNERS[manner]).format(answer)


def write_model(folder: Path, conversations: list[list[Message]], seed: int) -> None:
    """Write a tokenizer trained on the conversations, as the model will read them, and a random Mistral."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GenerationConfig, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

    specials = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    turns = ["[INST]", "[/INST]"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[*specials.values(), *turns],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast: Any = PreTrainedTokenizerFast  # its constructor has no types
    rendered = fast(tokenizer_object=bpe, chat_template=read_template("mistral"), **specials)
    texts = [str(rendered.apply_chat_template(messages, tokenize=False)) for messages in conversations]
    bpe.train_from_iterator(texts, trainer)
    tokenizer = fast(
        tokenizer_object=bpe,
        chat_template=read_template("mistral"),
        model_max_length=512,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **specials,
    )
    tokenizer.save_pretrained(folder)

    # Any, because a dict of keywords could be for any parameter, and no one type fits them all.
    ids: dict[str, Any] = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<{token}>") for name, token in ENDS.items()
    }
    # Every width is a multiple of 64, the number of weights that share one scale in NF4.
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
        sliding_window=None,
        initializer_range=0.06,
        tie_word_embeddings=False,
        dtype="float32",
        **ids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MistralForCausalLM(config)
    model.generation_config = GenerationConfig.from_dict({"max_new_tokens": 64, "do_sample": False, **ids})
    model.save_pretrained(folder)


def _draw_questions(train: dict[str, list[Question]], count: int, draw: random.Random) -> list[Question]:
    names = list(SHARES)
    return [draw.choice(train[name]) for name in draw.choices(names, [SHARES[name] for name in names], k=count)]


def _turn(prompt: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _write_rows(path: Path, rows: Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _stamp(seed: int) -> dict[str, Any]:
    """The seed, and a hash of everything that the demo is generated from: an edit makes a new demo."""
    code = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
    return {"seed": seed, "sources": hashlib.sha256(read_template("mistral").encode() + code).hexdigest()}
