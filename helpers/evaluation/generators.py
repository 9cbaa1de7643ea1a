"""What generates answers: a model or an adapter loaded here, or a model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import gc
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from helpers.core import CleanExit, SettingsError, UserError, fingerprint, printable
from helpers.data.messages import Message
from helpers.evaluation.answers import AnswerStore, Generator
from helpers.evaluation.questions import Question
from helpers.models.chat import (
    CHAT_TEMPLATES,
    eos_token_ids,
    fold_system_message,
    name_template,
    render,
    set_chat_template,
    supports_system_role,
)
from helpers.models.plan import plan_as_trained, prepare_model
from helpers.models.resolve import ModelRef, fetch_file, resolve_model
from helpers.settings.fields import RunSettings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

# Arguments of `model.generate` that change what it returns, or need an object.
UNSUPPORTED_ARGUMENTS = {"num_return_sequences", "return_dict_in_generate", "stop_strings"}
TEXT_ARGUMENTS = {"cache_implementation"}
SAMPLING_ARGUMENTS = ("temperature", "top_p", "top_k")
BODY_ARGUMENTS = {"top_k": 50, "repetition_penalty": 1.0}  # vLLM and others read these from the body; their defaults
# How newer models of OpenAI's call an argument; None: they do not accept it.
ARGUMENT_ALIASES: dict[str, str | None] = {"max_tokens": "max_completion_tokens", "temperature": None, "seed": None}
UNKNOWN_ARGUMENT = re.compile(r"unsupported|not supported|unrecognized|unknown|not permitted|instead", re.IGNORECASE)
Job = TypeVar("Job")
Result = TypeVar("Result")


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
    """A model on this machine, with or without an adapter. `autocast`: dtype that its training computed in."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    autocast: torch.dtype | None = None

    def generate(self, conversations: list[list[Message]], seed: int = 0, **kwargs: Any) -> list[str]:
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
        autocast = torch.autocast(self.model.device.type, self.autocast, enabled=self.autocast is not None)
        with torch.inference_mode(), autocast:
            output = self.model.generate(**inputs, pad_token_id=self.tokenizer.pad_token_id, **kwargs)
        new = self.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in new]

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
        self._local = [model for model in models if not model.base_url]
        self.plans = {m.name: plan_as_trained(m.base, m.plan, settings.quantization) for m in self._local}
        self._generator = HFGenerator(None, cast(Any, None))  # the one that holds the model in memory
        self._loaded: Any = None  # what its base is
        self._untouched: dict[str, tuple[int, int]] = {}  # the base's `_tensor_versions` as it was loaded

    def __rich__(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        columns = list(dict.fromkeys(name for row in self.loading.values() for name in row if name != "device"))
        table = Table("model", *columns, box=None, pad_edge=False)
        for name, row in self.loading.items():
            table.add_row(*map(Text, (name, *(row.get(column, "-") for column in columns))))
        return table

    @functools.cached_property
    def loading(self) -> dict[str, dict[str, str]]:
        """How each model is loaded and in which chat template it is asked, to be shown and recorded."""
        rows = {model.name: {"server": e.where, "chat template": "the server's"} for model, e in self.endpoints.items()}
        for ref in self._local:
            resolve_model(ref.base, ref.revision)
            config = json.loads(fetch_file(ref.base, ref.revision, "config.json").read_text())
            stored = (config.get("quantization_config") or {}).get("quant_method")
            rows[ref.name] = row = self.plans[ref.name].as_dict()
            if stored and row["quantization"] == "none":
                row["quantization"] = f"as stored, {stored}"
        for name, (_, template) in self.tokenizers.items():
            rows[name]["chat template"] = template
        return {ref.name: rows[ref.name] for ref in self.models}

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
            tokenizer = AutoTokenizer.from_pretrained(ref.tokenizer, **options)
            own = name_template(tokenizer)
            if given == "auto" and not own:
                fix = f"Choose one with `--chat_template`: {', '.join(CHAT_TEMPLATES)}, or a Jinja file."
                raise SettingsError(f"{ref.name} is without a chat template. {fix}")
            name, _ = set_chat_template(tokenizer, given)
            if given == "auto":
                is_policy_s = ref.policy and ref.tokenizer == ref.policy
                name = f"{own.replace('its own', 'that')} of {Path(ref.policy).name}" if is_policy_s else own
            found[ref.name] = tokenizer, name
        return found

    def fingerprint(self, questions: list[Question]) -> str:
        """Identifies the questions and the models' weights."""
        return fingerprint(questions, [model.fingerprint for model in self.models])

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
        from peft import PeftModel

        plan, (tokenizer, _) = self.plans[ref.name], self.tokenizers[ref.name]
        wanted = ref.base, ref.revision, plan.as_dict()
        base = self._take_off_adapter() if self._loaded == wanted else None
        if base is None:
            self._release()
            base = self._load_base(ref)
            self._loaded, self._untouched = wanted, _tensor_versions(base)
        prepare_model(base, tokenizer)
        model: Any = PeftModel.from_pretrained(base, ref.adapter) if ref.adapter else base
        if ref.mutates_base:
            self._loaded = None
        compute = plan.as_dict()["computed in"] if ref.plan and (ref.adapter or ref.policy) else "float32"
        autocast = None if compute == "float32" else getattr(torch, compute)
        self._generator = HFGenerator(model.eval(), tokenizer, autocast)
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

        Raises CleanExit at the end: a conversation is not saved, and has no run.
        """
        _, generator = next(Generators(self.models[-1:], self.settings).load())
        talk: list[Message] = []
        print("/new starts over, /quit ends.")
        with contextlib.suppress(EOFError, KeyboardInterrupt):
            for line in iter(lambda: input("> ").strip(), "/quit"):
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


def _tensor_versions(model: Any) -> dict[str, tuple[int, int]]:
    """Where each parameter is, and how often it was written to: the same for a model that nothing has changed."""
    weights = model.named_parameters(remove_duplicate=False)  # a layer may be used twice
    return {name: (weight.data_ptr(), weight._version) for name, weight in weights}


@dataclasses.dataclass(frozen=True)
class Reply:
    """A model's reply and the tokens used; 0 where the server does not report them."""

    text: str
    finished: bool  # False where the reply was cut off at max_tokens
    prompt_tokens: int
    completion_tokens: int


class RequestRefused(UserError):
    """The server refuses this one request: it is too long, or against its rules. Others may succeed."""


class Endpoint(Generator):
    """`model` at `base_url`, by default OPENAI_BASE_URL or OpenAI's own servers. Threads may share it.

    The key is OPENAI_API_KEY; your own server needs none. 429, 5xx, broken connections and `timeout` seconds of silence
    are tried `tries` times by openai's client, which honours a Retry-After of up to two minutes.
    """

    def __init__(self, model: str, base_url: str = "", timeout: float = 120.0, tries: int = 6) -> None:
        from openai import OpenAI

        url, key = base_url or os.environ.get("OPENAI_BASE_URL", ""), os.environ.get("OPENAI_API_KEY", "")
        where = re.sub(r"//[^/@]*@", "//", url).partition("?")[0]  # without what may be a password
        if url and not re.fullmatch(r"https?://[^/@\s?]+(/[^@\s?]*)?", url):
            raise SettingsError(f"--base_url {where!r} is not an address such as http://127.0.0.1:8000/v1")
        if not url and not key:
            fix = "set OPENAI_API_KEY in the environment or in .env, or --base_url to an OpenAI-compatible server"
            raise UserError(f"{model!r} at OpenAI needs a key: {fix}")
        self.model, self.where, self.tries = model, where or "api.openai.com", tries
        self.client = OpenAI(base_url=url or None, api_key=key or "none", timeout=timeout, max_retries=tries - 1)
        self.renamed: dict[str, str | None] = {}  # arguments that this model calls otherwise, or does not accept
        self.supports_system: bool | None = None  # not known yet

    def generate(self, conversations: list[list[Message]], seed: int = 0, **kwargs: Any) -> list[str | None]:
        """The conversations of a batch are sent at the same time."""
        arguments = _to_openai(kwargs) | {"seed": seed}
        answers: list[str | None] = [None] * len(conversations)

        def answer(i: int) -> None:
            try:
                answers[i] = self.ask(conversations[i], **arguments).text.strip()
            except RequestRefused as error:
                print(printable(f"note: {error}"))

        list(run_parallel(range(len(conversations)), answer, len(conversations)))
        return answers

    def ask(self, messages: list[Message], **arguments: Any) -> Reply:
        """One reply. A malformed one (no JSON, no choice, no text) is asked for again. Raises UserError."""
        for attempt in range(self.tries):
            time.sleep(min(0.5 * 2**attempt, 8.0) if attempt else 0)
            try:
                reply = self._create(messages, **arguments)
                text, finish = reply.choices[0].message.content or "", reply.choices[0].finish_reason
            except (json.JSONDecodeError, AttributeError, IndexError, TypeError):  # a gateway's page, half an object
                continue
            if text or finish:
                usage = getattr(reply, "usage", None)
                counts = (getattr(usage, name, 0) or 0 for name in ("prompt_tokens", "completion_tokens"))
                return Reply(text, finish != "length", *counts)
        raise UserError(f"{self.model} at {self.where} sent {self.tries} malformed replies in a row")

    def _create(self, messages: list[Message], **arguments: Any) -> Any:
        """A completion. Arguments that the server refuses are renamed or dropped; a system message is moved."""
        from openai import APIConnectionError, APIStatusError

        create: Any = self.client.chat.completions.create
        has_system, fold = messages[0]["role"] == "system", self.supports_system is False
        while True:
            names = {name: self.renamed.get(name, name) for name in arguments}
            sent = {new: arguments[name] for name, new in names.items() if new}
            try:
                reply = create(model=self.model, messages=fold_system_message(messages, supported=not fold), **sent)
            except APIConnectionError as error:  # a timeout is one
                raise UserError(f"no answer from {self.where}: {_first_line(error)} Is the server up?") from None
            except APIStatusError as error:
                refused = [name for name in ARGUMENT_ALIASES if name in sent and _is_unknown(error, name)]
                if error.status_code == 400 and refused:
                    self.renamed |= {name: ARGUMENT_ALIASES[name] for name in refused}
                    note = f"note: {self.model} does not accept {', '.join(refused)}: {_first_line(error)}"
                    print(printable(note))
                elif error.status_code in (400, 422, 500) and has_system and not fold and not self.supports_system:
                    fold = True  # the templates of Mistral, Gemma and others have no system role
                else:
                    raise self._explain(error) from None
                continue
            if has_system:
                self.supports_system = not fold
            return reply

    def _explain(self, error: Any) -> UserError:
        status, line = error.status_code, _first_line(error)
        if status in (400, 413, 422):
            return RequestRefused(f"{self.model} at {self.where} refuses the request: {line}")
        if status in (401, 403):
            return UserError(f"{self.where} does not accept the key in OPENAI_API_KEY ({status})")
        if status == 404:
            with contextlib.suppress(Exception):  # the first error says more
                line = f"it has {', '.join([model.id for model in self.client.models.list()][:8])}"
        problem = {404: f"has no model {self.model!r}", 429: "still asks to slow down"}.get(status, "fails")
        return UserError(f"{self.where} {problem} ({status}): {line}")


def _to_openai(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `model.generate` as OpenAI's. Raises SettingsError for those that an endpoint does not have."""
    rest = set(kwargs) - {"max_new_tokens", "do_sample", "num_beams", *SAMPLING_ARGUMENTS, *BODY_ARGUMENTS}
    if kwargs.get("num_beams", 1) > 1 or rest:
        names = ", ".join(sorted(rest)) or "--num_beams"
        raise SettingsError(f"{names} is not an argument of an OpenAI-compatible endpoint. Remove it.")
    arguments: dict[str, Any] = {"max_tokens": kwargs["max_new_tokens"], "temperature": 0.0}
    if kwargs.get("do_sample"):
        arguments |= {"temperature": kwargs["temperature"], "top_p": kwargs["top_p"]}
    body = {name: kwargs[name] for name, usual in BODY_ARGUMENTS.items() if kwargs.get(name, usual) != usual}
    return arguments | ({"extra_body": body} if body else {})


def run_parallel(jobs: Iterable[Job], work: Callable[[Job], Result], concurrency: int) -> Iterator[Result]:
    """work(job) of each job as it completes, `concurrency` at a time.

    After an exception no job is started; it is raised once the running ones are done. The threads are daemons, unlike
    those of concurrent.futures: Ctrl-C does not wait for a server that hangs.
    """
    errors: list[BaseException] = []

    def run(job: Job) -> list[Result]:
        try:
            return [] if errors else [work(job)]
        except BaseException as error:  # raised again in the caller's thread
            errors.append(error)
            return []

    with ThreadPool(max(1, concurrency)) as pool:
        for results in pool.imap_unordered(run, jobs):
            yield from results
    if errors:
        raise errors[0]


def _is_unknown(error: Any, name: str) -> bool:
    """Whether a server says that it has no argument of this name, rather than only mentioning it."""
    is_named = re.search(rf"\b{name}\b", error.message) and UNKNOWN_ARGUMENT.search(error.message)
    return getattr(error, "param", None) == name or bool(is_named)


def _first_line(error: Any) -> str:
    body = getattr(error, "body", None)
    return " ".join(str((isinstance(body, dict) and body.get("message")) or error).split())[:300]
