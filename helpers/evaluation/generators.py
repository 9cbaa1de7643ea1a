"""What generates answers: models and adapters loaded here, one after the other, or models behind endpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import gc
import json
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from helpers.core import CleanExit, SettingsError, UserError, fingerprint, is_notebook, printable
from helpers.data.messages import Message
from helpers.evaluation.answers import AnswerStore, Generator
from helpers.evaluation.endpoint import SAMPLING_ARGUMENTS, Endpoint
from helpers.evaluation.questions import OPEN_THOUGHT, Answer, Question
from helpers.models.chat import (
    eos_token_ids,
    fold_system_message,
    render,
    set_chat_template,
    special_token_pattern,
    supports_system_role,
)
from helpers.models.plan import plan_model, prepare_model
from helpers.models.resolve import ModelRef, resolve_model
from helpers.settings.fields import RunSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Arguments of `model.generate` that change what it returns, or need an object.
UNSUPPORTED_ARGUMENTS = {"num_return_sequences", "return_dict_in_generate", "stop_strings"}
TEXT_ARGUMENTS = {"cache_implementation"}
NO_INPUT = "--chat needs somebody who types, and there is no input here. Run `python notebooks/04_vibes.py --chat`."
THOUGHT_TOKEN = re.compile("think|thought|channel|message|inner_", re.IGNORECASE)  # a part of what marks thoughts


def generation_kwargs(settings: RunSettings) -> dict[str, Any]:
    """The arguments of `model.generate` among the settings, those of sampling only if it samples.

    Setting --temperature, --top_p or --top_k turns sampling on; a temperature of 0 turns it off. Raises SettingsError.
    """
    from transformers import GenerationConfig

    values = settings.values()
    if not settings.is_set("do_sample") and any(settings.is_set(name) for name in SAMPLING_ARGUMENTS):
        settings.override("sampling was asked for", do_sample=values["temperature"] > 0)
        values = settings.values()
    if values["do_sample"] and not values["temperature"]:
        raise SettingsError("--do_sample needs a --temperature above 0")
    names = ("max_new_tokens", "do_sample", "num_beams", "repetition_penalty", *SAMPLING_ARGUMENTS)
    kwargs = {name: values[name] for name in (names if values["do_sample"] else names[:4])}
    known = set(GenerationConfig().to_dict()) - UNSUPPORTED_ARGUMENTS
    for word in values["generation_kwargs"]:
        name, equals, value = word.partition("=")
        if not equals or name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}=...?" if close else "give NAME=VALUE"
            raise SettingsError(f"--generation_kwargs {word}: {hint}")
        try:
            kwargs[name] = value if name in TEXT_ARGUMENTS else json.loads(value.lower())
        except json.JSONDecodeError:
            raise SettingsError(f"--generation_kwargs {word}: a number, a list, true or false is needed") from None
    try:
        GenerationConfig(**kwargs).validate()
    except (TypeError, ValueError) as error:
        raise SettingsError(f"model.generate refuses these settings: {' '.join(str(error).split())[:300]}") from None
    return kwargs


@dataclasses.dataclass
class HFGenerator(Generator):
    """A model on this machine, with or without an adapter."""

    model: Any
    tokenizer: PreTrainedTokenizerBase

    def generate(self, conversations: list[list[Message]], seed: int = 0, **kwargs: Any) -> list[Answer]:
        """One answer per conversation, all in one batch, padded on the left so that answers start at the same place."""
        import torch
        from transformers import set_seed

        set_seed(seed)
        kwargs = {"eos_token_id": eos_token_ids(self.tokenizer, self.model.generation_config)} | kwargs
        system = supports_system_role(self.tokenizer)
        texts = [render(self.tokenizer, fold_system_message(talk, system), prompt=True) for talk in conversations]
        inputs = self.tokenizer(
            texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
        ).to(self.model.device)
        with torch.inference_mode():
            output = self.model.generate(**inputs, pad_token_id=self.tokenizer.pad_token_id, **kwargs)
        new = output[:, inputs["input_ids"].shape[1] :]
        ends = torch.as_tensor(kwargs["eos_token_id"], device=new.device).reshape(-1)
        cut = ~torch.isin(new, ends).any(dim=1)
        begun = ["".join(OPEN_THOUGHT.findall(text)) for text in texts]  # thoughts that the template begins
        answers = zip(begun, self._decode(new), cut.tolist(), strict=True)
        return [Answer(thoughts + text.strip(), cut=was_cut) for thoughts, text, was_cut in answers]

    def _decode(self, ids: Any) -> list[str]:
        """The texts without special tokens, except for those that mark thoughts."""
        special = special_token_pattern(self.tokenizer)
        if not any(THOUGHT_TOKEN.search(t.content) for t in self.tokenizer.added_tokens_decoder.values() if t.special):
            return self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=False)
        return [special.sub(lambda t: t[0] if THOUGHT_TOKEN.search(t[0]) else "", text) for text in texts]

    def stream(self, conversation: list[Message], seed: int, **kwargs: Any) -> str:
        from transformers import TextStreamer

        if kwargs.get("num_beams", 1) > 1:  # a beam search has no words until it ends
            return super().stream(conversation, seed, **kwargs)

        class PrintableStreamer(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                super().on_finalized_text(printable(text), stream_end)

        streamer = PrintableStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        return self.generate([conversation], seed, streamer=streamer, **kwargs)[0]


class Generators:
    """The models that answer, each loaded when it is needed, and how they sample. To show: how they are loaded.

    Raises SettingsError or UserError for arguments that are refused, a bad endpoint, or a model that cannot run here.
    """

    def __init__(self, models: list[ModelRef], settings: Any) -> None:
        self.models, self.settings, self.sampling = models, settings, generation_kwargs(settings)
        self.remote_code = {"trust_remote_code": settings.trust_remote_code}
        self.endpoints = {model: Endpoint(model.base, model.base_url) for model in models if model.base_url}
        self.plans = {m.base: plan_model(m.base, "none", settings.quantization) for m in models if not m.base_url}

    def __rich__(self) -> Any:
        from rich.text import Text

        servers = ", ".join(sorted({endpoint.where for endpoint in self.endpoints.values()}))
        return next(iter(self.plans.values()), Text(f"Answers come from {servers}."))

    def fingerprint(self, questions: list[Question]) -> str:
        """Identifies the questions and the models' weights."""
        return fingerprint(questions, [model.fingerprint for model in self.models])

    def load(self, answers: AnswerStore | None = None) -> Iterator[tuple[str, Generator]]:
        """Yield (name, generator) for each model that lacks an answer in `answers`; for each model without `answers`.

        One base is in memory at a time; adapters on the same base are switched on and off. A generator can be used
        until the next is asked for.
        """
        from peft import PeftModel
        from transformers import AutoTokenizer

        base: Any = None
        loaded: tuple[str, str] | None = None
        for ref in self.models:
            if answers is not None and not answers.missing(ref.name):
                continue
            if ref in self.endpoints:
                yield ref.name, self.endpoints[ref]
                continue
            if loaded != (ref.base, ref.revision):
                base = None
                gc.collect()  # free the base before loading the next
                base = self._load_base(ref)
            tokenizer = AutoTokenizer.from_pretrained(ref.tokenizer, **self.remote_code)
            set_chat_template(tokenizer, "auto")
            prepare_model(base, tokenizer)
            if ref.adapter:
                base = PeftModel.from_pretrained(base, ref.adapter)
            generator = HFGenerator(base.eval(), tokenizer)
            yield ref.name, generator
            generator.model = None  # the caller may still hold the generator
            base = base.unload() if ref.adapter else base
            loaded = None if ref.mutates_base else (ref.base, ref.revision)

    def _load_base(self, ref: ModelRef) -> Any:
        from transformers import AutoModelForCausalLM

        plan = self.plans[ref.base]
        options = {name: getattr(plan, name) for name in ("dtype", "attn_implementation", "device_map")}
        options |= {"revision": ref.revision or "main", "quantization_config": plan.quantization} | self.remote_code
        return AutoModelForCausalLM.from_pretrained(resolve_model(ref.base, ref.revision), **options)

    def chat(self) -> None:
        """Talk with the last model until /quit or the end of the input; /new starts over, Ctrl-C stops an answer.

        Raises CleanExit at the end: a conversation is not saved, and has no run; SettingsError where nobody can type.
        """
        kernel = getattr(sys.modules["IPython"].get_ipython(), "kernel", None) if is_notebook() else None
        if not getattr(kernel, "_allow_stdin", True):  # papermill's; before a model is loaded
            raise SettingsError(NO_INPUT)
        _, generator = next(Generators(self.models[-1:], self.settings).load())
        talk: list[Message] = []
        print("/new starts over, /quit ends.")
        with contextlib.suppress(EOFError, KeyboardInterrupt):
            for line in iter(_read_line, "/quit"):
                if line in ("/new", ""):
                    talk = [] if line else talk
                    continue
                talk.append({"role": "user", "content": line})
                try:
                    answer = generator.stream(talk, self.settings.seed + len(talk), **self.sampling)
                    talk.append({"role": "assistant", "content": answer})
                except (KeyboardInterrupt, UserError) as error:
                    talk.pop()
                    print(printable(f"\n({error or 'stopped'}; the question is removed)"))
        raise CleanExit("The conversation is not saved.")


def _read_line() -> str:
    try:
        return input("> ").strip()
    except (NotImplementedError, RuntimeError):  # IPython's, and Python's without sys.stdin
        raise SettingsError(NO_INPUT) from None
