"""The report on what happened to every row; for a dry run, an estimate of steps and tokens from a sample of rows."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from helpers.core import SettingsError, UserError, find_path, replaced
from helpers.data.encode import NOT_RENDERED, LengthLimits
from helpers.data.formats import PairingConfig, choose_format
from helpers.data.loading import DatasetSpec, load_rows, parse_dataset_specs
from helpers.data.messages import add_system_prompt
from helpers.models.chat import suggest_template
from helpers.models.resolve import Start
from helpers.runs.curves import MIN_STEPS, read_history
from helpers.runs.run import list_runs

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase as Tokenizer


EXAMPLES = 3  # row numbers that are shown for a reason
OTHERS_KEPT = "(other pairs of the row are kept)"
SAMPLED_ROWS = 200  # of each dataset, for an estimate
CHARACTERS_PER_TOKEN = 4  # if the tokenizer is not cached
Config = TypeVar("Config")


@dataclasses.dataclass
class RowReport:
    """What happened to every row: `kept + sum(dropped) == read`.

    `examples` has up to three row numbers for each reason, from 1, behind the dataset's name if there are several.
    A row of several pairs is kept if one of them is; the others are in `dropped_pairs`. `lengths` has the tokens of
    what was dropped as TOO_LONG or PROMPT_TOO_LONG, `sets` the counts of each dataset, `unused` the columns, and keys
    of messages, that are not read; `hash` is one over the tokens. `rendered_with` counts pairs and conversations with
    tools and thoughts, and by the variables of the chat template, as JSON.
    """

    read: int = 0
    kept: int = 0
    train: int = 0
    eval: int = 0
    format: str = ""
    hash: str = ""
    unused: list[str] = dataclasses.field(default_factory=list)
    changed: Counter[str] = dataclasses.field(default_factory=Counter)
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)
    flagged: Counter[str] = dataclasses.field(default_factory=Counter)
    dropped_pairs: Counter[str] = dataclasses.field(default_factory=Counter)
    rendered_with: Counter[str] = dataclasses.field(default_factory=Counter)
    changed_rows: int = 0
    examples: dict[str, list[int | str]] = dataclasses.field(default_factory=dict)
    lengths: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    sets: dict[str, Counter[str]] = dataclasses.field(default_factory=dict)

    def count(self, counter: Counter[str], reasons: Iterable[str], rows: Iterable[int | str]) -> None:
        """Count the reason of each row."""
        for reason, row in zip(reasons, rows, strict=True):
            counter[reason] += 1
            if len(examples := self.examples.setdefault(reason, [])) < EXAMPLES:
                examples.append(row)

    def check(self, strict: bool, tokenizer: Tokenizer | None = None) -> None:
        """Raise SettingsError if no row is left, or if `strict` and a row or pair was dropped. It names a template that
        is safe with `tokenizer` if the row's is at fault."""
        dropped = self.dropped + self.dropped_pairs
        if self.kept and not (strict and dropped):
            return
        reasons = "; ".join(f"{reason}: {n} (row {self.examples[reason][0]})" for reason, n in dropped.items())
        rows = f"{self.dropped.total()} of {self.read} rows cannot" if self.kept else f"no row of {self.read} can"
        by_template = [reason for reason in dropped if "chat template" in reason]
        if by_template and all(reason.endswith(NOT_RENDERED.format("")) for reason in by_template):
            reasons += ". Use a Jinja file that renders it: `--chat_template FILE`. Or remove it from the rows."
        elif by_template and tokenizer:
            reasons += f". {suggest_template(tokenizer)}"
        if self.kept:
            reasons = f"{reasons.rstrip('.')}. Fix these rows, or remove `--strict`."
        raise SettingsError(f"{rows} be used. {reasons}")

    @property
    def by_kind(self) -> dict[str, Counter[str]]:
        """Counts by reason of what was changed, dropped or flagged, and of dropped pairs of kept rows."""
        counts = {"changed": self.changed, "dropped": self.dropped, "dropped pairs": self.dropped_pairs}
        return counts | {"flagged": self.flagged}

    def as_dict(self) -> dict[str, Any]:
        """All counts, ready for JSON."""
        names = "format hash unused read kept train eval sets rendered_with examples"
        return {name: getattr(self, name) for name in names.split()} | {
            "changed": self.changed_rows,
            "dropped": self.dropped.total(),
            "reasons": {reason: n for reasons in self.by_kind.values() for reason, n in reasons.items()},
            "by": {kind: dict(reasons) for kind, reasons in self.by_kind.items()},
        }

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table("rows", "count", "example rows", box=None, pad_edge=False)
        table.add_row(f"read ({self.format})", f"{self.read:,}", "")
        for kind, reasons in self.by_kind.items():
            for reason, count in reasons.most_common():
                table.add_row(f"  {kind}: {reason}", f"{count:,}", ", ".join(map(str, self.examples[reason])))
        if self.unused:
            table.add_row("  not used", str(len(self.unused)), ", ".join(self.unused))
        table.add_row("kept", f"{self.kept:,}", "", style="bold")
        table.add_row("  train", f"{self.train:,}", "")
        table.add_row("  eval", f"{self.eval:,}", "")
        for what, count in self.rendered_with.items():
            if what != "{}":
                table.add_row("  with " + what.strip("{}").replace('"', ""), f"{count:,}", "")
        return table


@dataclasses.dataclass(frozen=True)
class Split:
    """Rows to train on (0: all) and to hold out (0: `eval_fraction` of them), in the order of `seed`."""

    train_rows: int = 0
    eval_rows: int = 0
    eval_fraction: float = 0.1
    seed: int = 0

    def held_out(self, rows: int) -> int:
        """How many of so many rows are evaluation rows, if no split of the dataset has them."""
        share = max(1, round(self.eval_fraction * rows))
        return max(0, min(self.eval_rows or share, max(share, rows // 4), rows - 1))


def config_from(settings: Any, cls: type[Config]) -> Config:
    """A dataclass filled from the settings of the same names; what the settings lack keeps its default."""
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    return cls(**{name: getattr(settings, name) for name in names if hasattr(settings, name)})


def estimate_workload(settings: Any, start: Start) -> str:
    """The work of `settings` in words, from a sample of each dataset; nothing is downloaded. Raises UserError if a
    local dataset cannot be used."""
    import datasets
    from huggingface_hub import constants

    count, note = _token_counter(start)
    max_steps, split = settings.trl.get("max_steps", -1), config_from(settings, Split)
    kept, tokens, has_eval_split = 0.0, 0.0, False
    for spec in parse_dataset_specs(settings):
        try:
            with replaced(constants, HF_HUB_OFFLINE=True), replaced(datasets.config, HF_HUB_OFFLINE=True):
                rows = load_rows(spec)
        except UserError:
            if spec.is_file_name or find_path(spec.id) is not None:
                raise
            steps = f"{max_steps:,} steps, unknown tokens" if max_steps > 0 else "Unknown steps and tokens"
            return f"{steps}: {spec.id} has not been downloaded yet."
        lengths, share = _sample_lengths(rows, settings, spec, count)
        kept, tokens = kept + len(lengths) * share, tokens + sum(lengths) * share
        has_eval_split = has_eval_split or bool(spec.eval_split)
    mean = tokens / max(1.0, kept)
    evaluated = split.eval_rows if has_eval_split else split.held_out(int(kept))
    kept -= 0 if has_eval_split else evaluated
    if kept < 1:
        raise UserError("none of the sampled rows can be used. Run `python -m helpers data` to see why.")
    trained = min(split.train_rows or math.inf, kept)
    units = trained * mean / settings.max_length if settings.trl.get("packing") else trained
    epoch = max(1, math.ceil(round(units) / settings.rows_per_step()))
    steps = max_steps if max_steps > 0 else math.ceil(settings.num_train_epochs * epoch)
    passes = steps / epoch * trained
    work = f"About {round(trained):,} rows to train on, {steps:,} steps, {passes * mean:,.0f} tokens{note}."
    return work + _describe_evaluation(settings, steps, evaluated, passes) + _describe_time(settings, passes * mean)


def _describe_evaluation(settings: Any, steps: int, evaluated: int, trained: float) -> str:
    """A line with the number of evaluations and their share of the computation; "" without one.

    A forward pass counts 1 a row, and the reference's of an evaluation row is needed once. A row that is trained on
    takes a forward pass, another with checkpointing, a backward pass (2 with all weights) and the reference's.
    """
    trl, is_dpo = settings.trl, settings.step == "dpo"
    every = trl.get("eval_steps", 0.2)
    count = steps // math.ceil(every * steps if every < 1 else every)
    count = {"no": 0, "epoch": math.ceil(settings.num_train_epochs)}.get(str(trl.get("eval_strategy")), count)
    count += bool(trl.get("eval_on_start", is_dpo)) if count else 0
    if not count or evaluated < 1:
        return ""
    own = evaluated * (count + is_dpo)
    all_of_it = own + trained * (2 + trl.get("gradient_checkpointing", True) + (settings.tuning == "full") + is_dpo)
    return f"\nEvaluation: {count} times {evaluated:,} rows, {own / all_of_it:.0%} of the computation."


def _describe_time(settings: Any, tokens: float) -> str:
    """A line with the time at the speed of the newest finished run of this step, model and tuning; "" without one."""
    same = {name: getattr(settings, name) for name in ("model_id", "tuning", "quantization")}
    for run in list_runs(settings.output_dir, settings.step):
        speed = run.record.get("metrics", {}).get("tokens_per_second")
        if not speed or not run.finished or not same.items() <= run.record.get("settings", {}).items():
            continue
        if max((log["step"] for log in read_history(run.folder / "metrics.jsonl")), default=0) >= MIN_STEPS:
            minutes = round(tokens / speed / 60)
            time = f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
            time = time if minutes > 1 else f"{tokens / speed:.0f} s"
            return f"\nAbout {time}, at {speed:,.0f} tokens per second as in {run.name}."
    return ""


def _sample_lengths(
    rows: Dataset, settings: Any, spec: DatasetSpec, count: Callable[[str], int]
) -> tuple[list[float], float]:
    """Tokens to compute for each usable example of a sample, and how many examples each of them represents."""
    limits, pairing = config_from(settings, LengthLimits), config_from(settings, PairingConfig)
    max_prompt, max_total = limits.bounds
    row_format = choose_format(rows, spec.format, use_pairs=settings.step == "dpo")
    sample, lengths = rows.select(range(0, len(rows), max(1, len(rows) // SAMPLED_ROWS))), list[float]()
    examples = [example for row in sample for example in row_format.read(row, pairing)]
    for example in (example for example in examples if not isinstance(example, str)):
        talks = add_system_prompt(example.prompt, settings.system_prompt), example.chosen, example.rejected
        prompt, *answers = (sum(count(m["content"]) for m in talk) for talk in talks if talk)
        if limits.overlong == "truncate_prompt":
            prompt = max(1, min(prompt, max_prompt, max_total - max(answers)))
        elif limits.overlong == "truncate_completion":
            answers = [min(answer, max(1, max_total - prompt)) for answer in answers]
        if prompt <= max_prompt and prompt + max(answers) <= max_total:
            lengths.append(sum(prompt + answer for answer in answers))
    return lengths, spec.fraction * len(rows) / len(sample)


def _token_counter(start: Start) -> tuple[Callable[[str], int], str]:
    """A function that counts the tokens of a text, and a note if it only estimates them."""
    from huggingface_hub import try_to_load_from_cache
    from tokenizers import Tokenizer

    folder = start.parent.folder if start.parent else find_path(start.model)
    cached = None if folder else try_to_load_from_cache(start.model, "tokenizer.json", revision=start.revision)
    file = folder / "tokenizer.json" if folder else Path(cached) if isinstance(cached, str) else Path()
    if file.is_file():
        tokenizer = Tokenizer.from_file(str(file))
        return lambda text: len(tokenizer.encode(text, add_special_tokens=False)), ""
    note = f" (at {CHARACTERS_PER_TOKEN} characters per token, because the tokenizer is not downloaded yet)"
    return lambda text: len(text) // CHARACTERS_PER_TOKEN + 1, note
