"""What generates answers: a model or an adapter loaded here, or a model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import gc
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.pool import ThreadPool
from typing import TYPE_CHECKING, Any, TypeVar

from helpers.core import CleanExit, SettingsError, UserError, fingerprint, printable
from helpers.data.messages import Message
from helpers.evaluation.answers import AnswerStore, Generator
from helpers.evaluation.questions import Question
from helpers.models.chat import eos_token_ids, fold_system_message, render, set_chat_template, supports_system_role
from helpers.models.plan import load_adapter, plan_model, prepare_model
from helpers.models.resolve import ModelRef, resolve_model
from helpers.settings.fields import RunSettings

if TYPE_CHECKING:
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
    """A model on this machine, with or without an adapter."""

    model: Any
    tokenizer: PreTrainedTokenizerBase

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
        with torch.inference_mode():
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
                base = load_adapter(base, ref.adapter)
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
