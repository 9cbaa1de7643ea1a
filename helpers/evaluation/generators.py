"""What generates answers: models and adapters loaded here, one after the other, or models behind endpoints."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import gc
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from helpers.core import CleanExit, SettingsError, Terminated, UserError, find_path, fingerprint, is_notebook, printable
from helpers.data.messages import Message
from helpers.evaluation.answers import AnswerStore, Generator
from helpers.evaluation.endpoint import SAMPLING_ARGUMENTS, Endpoint
from helpers.evaluation.questions import OPEN_THOUGHT, Answer
from helpers.models.adapters import load_adapter, read_pretrained
from helpers.models.chat import (
    CHAT_TEMPLATES,
    EachOptions,
    eos_token_ids,
    fold_system_message,
    name_template,
    render,
    set_chat_template,
    special_token_pattern,
    supports_system_role,
)
from helpers.models.plan import plan_as_trained, prepare_model
from helpers.models.resolve import ModelRef, fetch_file, resolve_model
from helpers.runs.run import lineage, read_run, recorded_variables
from helpers.settings.fields import RunSettings, template_variables

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

# Arguments of `model.generate` that change what it returns, or need an object.
UNSUPPORTED_ARGUMENTS = {"num_return_sequences", "return_dict_in_generate", "stop_strings"}
TEXT_ARGUMENTS = {"cache_implementation"}
NO_INPUT = "--chat needs an interactive terminal. Run `python notebooks/04_vibes.py --chat` in one."
THOUGHT_TOKEN = re.compile("think|thought|channel|message|inner_", re.IGNORECASE)  # a part of what marks thoughts


def generation_kwargs(settings: RunSettings) -> dict[str, Any]:
    """The arguments of `model.generate` among the settings, those of sampling only if it samples.

    Setting --temperature, --top_p or --top_k turns sampling on; a temperature of 0 turns it off. Raises SettingsError.
    """
    values = settings.values()
    if "do_sample" not in values:  # 06_pairs.py samples, with nothing else
        return {name: values[name] for name in ("max_new_tokens", "temperature", "top_p")} | {"do_sample": True}
    from transformers import GenerationConfig

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


class GumbelNoise:
    """A logits processor after which the most likely token is a sample: the Gumbel-max trick (Maddison et al., 2014,
    arXiv:1411.0030). Each row has a generator with its own seed."""

    def __init__(self, seeds: list[int], device: Any) -> None:
        import torch

        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = scores.new_empty(scores.shape, dtype=scores.dtype)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.log()


@dataclasses.dataclass
class HFGenerator(Generator):
    """A model on this machine, with or without an adapter. `autocast`: dtype that its training computed in;
    `variables`: those of the chat template."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    autocast: torch.dtype | None = None
    variables: dict[str, Any] = dataclasses.field(default_factory=dict)

    def generate(
        self, conversations: list[list[Message]], seed: int = 0, options: EachOptions = None, **kwargs: Any
    ) -> list[Answer]:
        """One answer per conversation, all in one batch, padded on the left so that answers start at the same place."""
        import torch
        from transformers import set_seed

        set_seed(seed)
        kwargs = {"eos_token_id": eos_token_ids(self.tokenizer, self.model.generation_config)} | kwargs
        system = supports_system_role(self.tokenizer)
        talks = [fold_system_message(talk, system) for talk in conversations]
        given = [self.variables | dict(own) for own in options or [{}] * len(talks)]
        texts = [render(self.tokenizer, talk, True, own) for talk, own in zip(talks, given, strict=True)]
        inputs = self.tokenizer(
            texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
        ).to(self.model.device)
        device = torch.device(self.model.device).type
        autocast = torch.autocast(device, self.autocast, enabled=self.autocast is not None)
        with torch.inference_mode(), autocast:
            output = self.model.generate(**inputs, pad_token_id=self.tokenizer.pad_token_id, **kwargs)
        new = output[:, inputs["input_ids"].shape[1] :]
        ends = torch.as_tensor(kwargs["eos_token_id"], device=new.device).reshape(-1)
        cut = ~torch.isin(new, ends).any(dim=1)
        begun = ["".join(OPEN_THOUGHT.findall(text)) for text in texts]  # thoughts that the template begins
        answers = zip(begun, self._decode(new), cut.tolist(), strict=True)
        return [Answer(thoughts + text.strip(), cut=was_cut) for thoughts, text, was_cut in answers]

    def sample(
        self, conversations: list[list[Message]], seeds: list[list[int]], options: EachOptions = None, **kwargs: Any
    ) -> list[list[Answer]]:
        """All answers in one batch. Each is drawn with its own seed, whatever else is in the batch."""
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

        device = self.model.device
        steps: list[Any] = [TemperatureLogitsWarper(kwargs["temperature"])]
        if kwargs["top_p"] < 1:  # it sorts the vocabulary
            steps.append(TopPLogitsWarper(kwargs["top_p"]))
        draw = LogitsProcessorList([*steps, GumbelNoise([seed for own in seeds for seed in own], device)])
        kwargs |= {"do_sample": False, "logits_processor": draw} | dict.fromkeys(SAMPLING_ARGUMENTS)
        given = options or [{}] * len(seeds)
        talks = [(talk, o) for talk, o, own in zip(conversations, given, seeds, strict=True) for _ in own]
        answers = iter(self.generate([talk for talk, _ in talks], options=[o for _, o in talks], **kwargs))
        return [[next(answers) for _ in own] for own in seeds]

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

    def __init__(self, models: list[ModelRef], settings: Any, sampling: dict[str, Any] | None = None) -> None:
        self.models, self.settings = models, settings
        self.sampling = generation_kwargs(settings) if sampling is None else sampling
        self.remote_code = {"trust_remote_code": settings.trust_remote_code}
        given = template_variables(settings)
        flag = "--base_url" if getattr(settings, "base_url", "") else "--models"
        self.endpoints = {m: Endpoint(m.base, m.base_url, variables=given, flag=flag) for m in models if m.base_url}
        folders = {m.name: None if m.base_url else find_path(m.policy or m.adapter or m.base) for m in models}
        trained_with = {n: recorded_variables(lineage(folder)) if folder else {} for n, folder in folders.items()}
        self.variables = {name: variables | given for name, variables in trained_with.items()}
        self._local = [model for model in models if not model.base_url]
        how = settings.quantization, getattr(settings, "attn_implementation", "auto")
        self.plans = {m.name: plan_as_trained(m.base, m.plan, *how) for m in self._local}
        self._generator = HFGenerator(None, cast(Any, None))  # the one that holds the model in memory
        self._loaded: Any = None  # what its base is
        self._untouched: dict[str, tuple[int, int]] = {}  # the base's `_tensor_versions` as it was loaded

    def __rich__(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        if not self.loading:
            return Text("")
        columns = list(dict.fromkeys(name for row in self.loading.values() for name in row if name != "device"))
        table = Table("model", *columns, box=None, pad_edge=False)
        for name, row in self.loading.items():
            table.add_row(*map(Text, (name, *(row.get(column, "-") for column in columns))))
        return table

    @functools.cached_property
    def loading(self) -> dict[str, dict[str, str]]:
        """How each model is loaded and in which chat template it is asked, to be shown and recorded."""
        from transformers import AutoConfig

        rows = {model.name: {"server": e.where, "chat template": "the server's"} for model, e in self.endpoints.items()}
        for ref in self._local:
            path = resolve_model(ref.base, ref.revision)
            read_pretrained(AutoConfig, path, revision=ref.revision or "main", **self.remote_code)
            config = json.loads(fetch_file(ref.base, ref.revision, "config.json").read_text())
            stored = (config.get("quantization_config") or {}).get("quant_method")
            rows[ref.name] = row = self.plans[ref.name].as_dict()
            if stored and row["quantization"] == "none":
                row["quantization"] = f"as stored, {stored}"
        for name, (_, template) in self.tokenizers.items():
            rows[name]["chat template"] = template
        for name, variables in self.variables.items():
            if variables:
                rows[name]["template variables"] = json.dumps(variables, ensure_ascii=False)
        return {ref.name: rows[ref.name] for ref in self.models}

    @property
    def weights(self) -> dict[str, str]:
        """The fingerprint of each model that a run has made, as in its run.json; other models are left out."""
        folders = {ref.name: find_path(ref.adapter or ref.base) for ref in self._local}
        records = {name: read_run(folder) for name, folder in folders.items() if folder}
        return {name: record["fingerprint"] for name, record in records.items() if record.get("fingerprint")}

    @property
    def described(self) -> dict[str, Any]:
        """How the answers are made, for the vote page: the sampling, and in words how each model is loaded."""
        words = {n: ", ".join(f"{key} {value}" for key, value in row.items()) for n, row in self.loading.items()}
        return self.sampling | {f"model {name}": text for name, text in words.items()}

    @functools.cached_property
    def tokenizers(self) -> dict[str, tuple[PreTrainedTokenizerBase, str]]:
        """The tokenizer of each model that is loaded here, and where its chat template is from.

        Raises SettingsError for a model without one."""
        from transformers import AutoTokenizer

        found: dict[str, tuple[PreTrainedTokenizerBase, str]] = {}
        given = self.settings.chat_template
        for ref in self._local:
            options = self.remote_code | ({"revision": ref.revision or "main"} if ref.tokenizer == ref.base else {})
            tokenizer = read_pretrained(AutoTokenizer, ref.tokenizer, **options)
            own = name_template(tokenizer)
            if given == "auto" and not own:
                fix = f"Choose one with `--chat_template`: {', '.join(CHAT_TEMPLATES)}, or a Jinja file."
                raise SettingsError(f"{ref.name} has no chat template. {fix}")
            name, _ = set_chat_template(tokenizer, given)
            if given == "auto":
                is_policy_s = ref.policy and ref.tokenizer == ref.policy
                name = f"{own.replace('its own', 'that')} of {Path(ref.policy).name}" if is_policy_s else own
            found[ref.name] = tokenizer, name
        return found

    @functools.cached_property
    def fingerprints(self) -> dict[str, str]:
        """Identifies the weights and the chat template of each model."""
        known = {model.name: model.fingerprint for model in self.models}
        templates = {name: str(tokenizer.chat_template) for name, (tokenizer, _) in self.tokenizers.items()}
        return known | {name: fingerprint(known[name], template) for name, template in templates.items()}

    def fingerprint(self, *asked: Any) -> str:
        """Identifies what is asked, and the models' weights and chat templates."""
        return fingerprint(*asked, [*self.fingerprints.values()])

    def load(self, answers: AnswerStore | None = None) -> Iterator[tuple[str, Generator]]:
        """Yield (name, generator) for each model that lacks an answer in `answers`; for each model without `answers`.

        One base is in memory at a time. Adapters on the same base are switched on and off; where one cannot be taken
        off without a trace, the base is loaded again. A generator can be used until the next is asked for.
        """
        try:
            for ref in self.models:
                if answers is not None and not answers.missing(ref.name):
                    continue
                yield ref.name, self.endpoints[ref] if ref in self.endpoints else self._switch_to(ref)
        finally:
            self._release()

    def _switch_to(self, ref: ModelRef) -> HFGenerator:
        """The generator of `ref`, on the base in memory where that is the right one and as it was loaded."""
        import torch

        plan, (tokenizer, _) = self.plans[ref.name], self.tokenizers[ref.name]
        wanted = ref.base, ref.revision, plan.as_dict()
        base = self._take_off_adapter() if self._loaded == wanted else None
        if base is None:
            self._release()
            base = self._load_base(ref)
            self._loaded, self._untouched = wanted, _tensor_versions(base)
        prepare_model(base, tokenizer, ref.adapter)
        model: Any = load_adapter(base, ref.adapter) if ref.adapter else base
        if ref.mutates_base:
            self._loaded = None
        compute = plan.as_dict()["computed in"] if ref.plan and (ref.adapter or ref.policy) else "float32"
        autocast = None if compute == "float32" else getattr(torch, compute)
        self._generator = HFGenerator(model.eval(), tokenizer, autocast, self.variables[ref.name])
        return self._generator

    def _take_off_adapter(self) -> Any:
        """The base in memory without the adapter on it; None if it is not exactly as it was loaded."""
        model, self._generator.model = self._generator.model, None  # the caller may still hold the generator
        base = model.unload() if hasattr(getattr(model, "base_model", None), "unload") else model
        return base if _tensor_versions(base) == self._untouched else None

    def _release(self) -> None:
        """Free the model in memory, also where the caller still holds its generator."""
        self._generator.model = self._loaded = None
        gc.collect()

    def _load_base(self, ref: ModelRef) -> Any:
        from transformers import AutoModelForCausalLM

        plan = self.plans[ref.name]
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
        models = Generators(self.models[-1:], self.settings).load()  # kept: at its end the model is released
        _, generator = next(models)
        talk: list[Message] = []
        print("/new starts over, /quit ends.")
        try:
            for line in iter(_read_line, "/quit"):
                if line in ("/new", ""):
                    talk = [] if line else talk
                    continue
                talk.append({"role": "user", "content": line})
                try:
                    answer = generator.stream(talk, self.settings.seed + len(talk), **self.sampling)
                    talk.append({"role": "assistant", "content": answer})
                except (KeyboardInterrupt, UserError) as error:
                    if isinstance(error, Terminated):
                        raise
                    talk.pop()
                    print(printable(f"\n({error or 'stopped'}; the question is removed)"))
        except Terminated:
            raise
        except (EOFError, KeyboardInterrupt):
            pass
        raise CleanExit("The conversation is not saved.")


def _tensor_versions(model: Any) -> dict[str, tuple[int, int]]:
    """Where each parameter is, and how often it was written to: the same for a model that nothing has changed."""
    weights = model.named_parameters(remove_duplicate=False)  # a layer may be used twice
    return {name: (weight.data_ptr(), weight._version) for name, weight in weights}


def _read_line() -> str:
    try:
        return input("> ").strip()
    except (NotImplementedError, RuntimeError):  # IPython's, and Python's without sys.stdin
        raise SettingsError(NO_INPUT) from None
