"""Answers of the policy while it trains: a few fixed prompts, greedily, beside the curves."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from helpers.chat import end_tokens
from helpers.history import SAMPLES, read_samples
from helpers.processes import is_main_process

PROMPTS = 8


class Sampler(TrainerCallback):
    """Answers the first held-out prompts before the first step and every `every` steps (below 1: that share of all).

    Each answer is a line of samples.jsonl; their mean length (tokens) and the share that was cut off are a log of their
    own, `samples/mean_length` and `samples/cut`.
    Nothing of the training changes: the answers are greedy, and draw no random numbers. Under ZeRO-3 and FSDP there are
    none, for every process would have to take part. Read in transformers 5.23 (trainer_callback.py).
    """

    def __init__(self, trainer: Any, folder: Path, rows: Any, every: float, max_new_tokens: int) -> None:
        self.trainer, self.file, self.every, self.max_new_tokens = trainer, folder / SAMPLES, every, max_new_tokens
        few = rows.select(range(min(10 * PROMPTS, len(rows))))  # pairs of one prompt stand together
        self.prompts = [p for p in dict.fromkeys(tuple(prompt_of(row)) for row in few) if p][:PROMPTS]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        plugin = self.trainer.accelerator.state.deepspeed_plugin
        if self.trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3):
            self.every = 0
            print("samples: none, because the weights lie in pieces (FSDP, ZeRO-3); 04_vibes.py reads the result")
        self.every = math.ceil(self.every * state.max_steps) if self.every < 1 else math.ceil(self.every)
        if is_main_process():
            kept = [row for row in read_samples(self.file.parent) if 0 < state.global_step >= row["step"]]
            self.file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), "utf-8")
        if state.global_step == 0:
            self._sample(args, state, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.every and (state.global_step % self.every == 0 or state.global_step == state.max_steps):
            self._sample(args, state, control)

    def _sample(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        if not (self.every and self.prompts and is_main_process()):
            return
        tokenizer, accelerator = self.trainer.processing_class, self.trainer.accelerator
        model = accelerator.unwrap_model(self.trainer.model)
        with accelerator.autocast():  # which the Trainer's own forward has, and `generate` has not
            answers = answer_greedily(model, tokenizer, self.prompts, self.max_new_tokens)
        with self.file.open("a", encoding="utf-8") as file:
            for prompt, answer in zip(self.prompts, answers, strict=True):
                texts = {
                    "prompt": tokenizer.decode(prompt, skip_special_tokens=True).strip(),
                    "answer": tokenizer.decode(answer, skip_special_tokens=True).strip(),
                }
                file.write(json.dumps({"step": state.global_step, **texts, "tokens": len(answer)}, ensure_ascii=False))
                file.write("\n")
        mean, ends = sum(map(len, answers)) / len(answers), end_tokens(tokenizer, model.generation_config)
        cut = sum(len(ids) == self.max_new_tokens and ids[-1] not in ends for ids in answers) / len(answers)
        tqdm.write(f"step {state.global_step}: sampled answers have {mean:.3g} tokens; {_shorten(texts)}")
        # not Trainer.log: TRL's (dpo_trainer.py, log) adds what it has gathered since its last log, and forgets it
        row = {"samples/mean_length": mean, "samples/cut": cut, "epoch": state.epoch or 0.0}
        state.log_history.append({**row, "step": state.global_step})
        self.trainer.callback_handler.call_event("on_log", args, state, control, logs=row)


def prompt_of(row: dict[str, Any]) -> list[int]:
    """The prompt's tokens: a column of their own in pairs; in a conversation, all before the first that is learned."""
    if "prompt_ids" in row:
        return list(row["prompt_ids"])
    first = next((i for i, label in enumerate(row["labels"]) if label != -100), len(row["labels"]))
    return list(row["input_ids"][:first])


def answer_greedily(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[list[int]]:
    """The tokens of one answer a prompt, its end included; the model is left as it was found."""
    ends = end_tokens(tokenizer, model.generation_config)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,  # which gradient checkpointing has switched off in the model's own
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=ends,
    )
    batch = tokenizer.pad({"input_ids": list(map(list, prompts))}, padding_side="left", return_tensors="pt").to(
        model.device
    )
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            output = model.generate(**batch, generation_config=config)
    finally:
        model.train(training)
    new = output[:, batch["input_ids"].shape[1] :].tolist()
    return [ids[: next((i + 1 for i, t in enumerate(ids) if t in ends), len(ids))] for ids in new]


def _shorten(texts: dict[str, str], width: int = 60) -> str:
    prompt, answer = (" ".join(texts[name].split()) for name in ("prompt", "answer"))
    return f"{prompt[-width:]} → {answer[:width]}"
