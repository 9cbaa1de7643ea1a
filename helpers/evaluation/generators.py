"""What answers: a model, an adapter on its base, or an endpoint; a batch at a time, or a word at a time."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from helpers.core import SettingsError, UserError
from helpers.data.conversations import Message
from helpers.models.chat import eos_token_ids, fold_system_message, prepend_system, render, supports_system_role
from helpers.settings.fields import RunSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# Arguments that make of an answer something else than one text, or need more than a value.
UNSUPPORTED = {"num_return_sequences", "return_dict_in_generate", "stop_strings", "output_scores", "output_logits"}
TEXTS = {"cache_implementation", "early_stopping"}
SAMPLED = ("temperature", "top_p", "top_k")  # have a meaning when sampling only
PASSED_ON = ("top_k", "repetition_penalty")  # not OpenAI's: vLLM and others read them from the body


class Generator(Protocol):
    """What answers: a model here, or one behind an endpoint."""

    def answer(self, conversations: list[list[Message]], seed: int, **sampling: Any) -> Sequence[str | None]:
        """One answer a conversation, in their order; None for one that is refused."""

    def say(self, conversation: list[Message], seed: int, **sampling: Any) -> str:
        """One answer, printed as it comes."""


def generation_kwargs(settings: RunSettings) -> dict[str, Any]:
    """The arguments of `model.generate` among the settings; those of sampling only when it samples.

    A temperature, top_p or top_k that was given means that it is to sample, a temperature of 0 that it is not. Raises
    SettingsError for a word of --generation_kwargs that is not one of its arguments, and for values that it refuses.
    """
    from transformers import GenerationConfig

    own: Any = settings
    if not settings.is_set("do_sample") and any(settings.is_set(name) for name in SAMPLED):
        settings.override("sampling was asked for", do_sample=own.temperature > 0)
    if own.do_sample and not (own.temperature > 0 and 0 < own.top_p <= 1):
        raise SettingsError("--do_sample needs a --temperature above 0, and a --top_p above 0 and at most 1")
    names = ("max_new_tokens", "do_sample", "num_beams", "repetition_penalty")
    values, known = settings.values(), GenerationConfig().to_dict()
    more = {}
    for word in values["generation_kwargs"]:
        name, equals, value = word.partition("=")
        if not equals or name not in known or name in UNSUPPORTED:
            close = difflib.get_close_matches(name, set(known) - UNSUPPORTED, n=1)
            raise SettingsError(
                f"--generation_kwargs {word}: {f'did you mean {close[0]}=...?' if close else 'give NAME=VALUE'}"
            )
        try:
            more[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except json.JSONDecodeError:
            if name not in TEXTS:
                raise SettingsError(f"--generation_kwargs {word}: a number, a list, true or false is needed") from None
            more[name] = value
    chosen = {name: values[name] for name in names + (SAMPLED if values["do_sample"] else ())} | more
    try:
        GenerationConfig(**chosen).validate()
    except (TypeError, ValueError) as error:
        raise SettingsError(f"model.generate refuses these settings: {' '.join(str(error).split())[:300]}") from None
    return chosen


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[list[Message]],
    batch_size: int,
    **sampling: Any,
) -> list[str]:
    """One answer a conversation, in their order. `sampling` goes to `model.generate`.

    Batches hold prompts of similar length, padded on the left, so that every answer starts where its prompt ends.
    """
    import torch

    sampling = {"eos_token_id": eos_token_ids(tokenizer, model.generation_config)} | sampling
    system = supports_system_role(tokenizer)
    texts = [render(tokenizer, fold_system_message(messages, system), prompt=True) for messages in conversations]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
    answers = [""] * len(texts)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        inputs = tokenizer(
            [texts[i] for i in batch], add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
        ).to(model.device)
        with torch.inference_mode():
            output = model.generate(  # type: ignore[operator]  # the stubs call it a tensor
                **inputs, pad_token_id=tokenizer.pad_token_id, **sampling
            )
        new = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, answer in zip(batch, new, strict=True):
            answers[i] = answer.strip()
    return answers


class HFGenerator:
    """A model here, with or without an adapter."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer

    def answer(self, conversations: list[list[Message]], seed: int, **sampling: Any) -> list[str]:
        from transformers import set_seed

        set_seed(seed)
        return generate_answers(self.model, self.tokenizer, conversations, len(conversations), **sampling)

    def say(self, conversation: list[Message], seed: int, **sampling: Any) -> str:
        from transformers import TextStreamer, set_seed

        set_seed(seed)
        beams = sampling.get("num_beams", 1) > 1  # which have no words until all of them are done
        streamer = None if beams else TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        (answer,) = generate_answers(self.model, self.tokenizer, [conversation], 1, streamer=streamer, **sampling)
        if beams:
            print(answer)
        return answer


class OpenAIGenerator:
    """A model behind an OpenAI-compatible endpoint; the conversations of a batch are asked at the same time."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint

    def answer(self, conversations: list[list[Message]], seed: int, **sampling: Any) -> list[str | None]:
        words = _for_endpoint(sampling) | {"seed": seed}

        def ask(i: int) -> str | None:
            try:
                return self.endpoint.ask(conversations[i], **words).text.strip()
            except Refused as error:
                print(f"note: {error}")
                return None

        jobs = range(len(conversations))
        answers = dict(run_parallel(jobs, ask, len(jobs)))
        return [answers[i] for i in jobs]

    def say(self, conversation: list[Message], seed: int, **sampling: Any) -> str:
        pieces = []
        for piece in self.endpoint.stream(conversation, **_for_endpoint(sampling), seed=seed):
            print(piece, end="", flush=True)
            pieces.append(piece)
        print()
        return "".join(pieces).strip()


def _for_endpoint(sampling: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `model.generate` as OpenAI's. Raises SettingsError for those that an endpoint has not."""
    rest = set(sampling) - {"max_new_tokens", "do_sample", "num_beams", *SAMPLED, *PASSED_ON}
    if sampling.get("num_beams", 1) > 1 or rest:
        raise SettingsError(f"an endpoint takes no {', '.join(sorted(rest)) or '--num_beams'}: leave it out")
    words: dict[str, Any] = {"max_tokens": sampling["max_new_tokens"], "temperature": 0.0}
    if sampling.get("do_sample"):
        words |= {"temperature": sampling["temperature"], "top_p": sampling["top_p"]}
    usual = {"top_k": 50, "repetition_penalty": 1.0}
    body = {name: sampling[name] for name in PASSED_ON if sampling.get(name, usual[name]) != usual[name]}
    return words | ({"extra_body": body} if body else {})


def chat_loop(speaker: Generator, seed: int, lines: Iterable[str] | None = None, **sampling: Any) -> None:
    """Talk with a model until /quit or the end of the input; /new begins anew, Ctrl-C ends an answer."""
    talk: list[Message] = []
    print("/new begins anew, /quit ends.")
    for line in lines if lines is not None else _typed():
        if line.strip() in ("/quit", "/exit"):
            return
        if line.strip() == "/new":
            talk = []
            continue
        if not line.strip():
            continue
        talk.append({"role": "user", "content": line.strip()})
        try:
            talk.append({"role": "assistant", "content": speaker.say(talk, seed + len(talk), **sampling)})
        except (KeyboardInterrupt, UserError) as error:
            talk.pop()
            print(f"\n({error or 'stopped'}; the question is taken back)")


def _typed() -> Iterator[str]:
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


Job = TypeVar("Job")
Done = TypeVar("Done")
# Names that newer models of OpenAI's want in place of older ones; None: to be left out.
ARGUMENT_ALIASES: dict[str, str | None] = {"max_tokens": "max_completion_tokens", "temperature": None, "seed": None}
UNKNOWN = re.compile(r"unsupported|not supported|unrecognized|unknown|not permitted|instead", re.IGNORECASE)
LONGEST_WAIT = 900.0  # seconds that a Retry-After may ask for


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a model said, and what it cost in tokens; 0 where the server does not say."""

    text: str
    finished: bool  # False where the reply was cut off at its longest
    prompt_tokens: int
    completion_tokens: int


class Refused(UserError):
    """The server takes this one request not, whatever it makes of others: too long, or against its rules."""


class Endpoint:
    """`model` at `base_url`, or where OPENAI_BASE_URL or OpenAI's own servers are.

    The key is OPENAI_API_KEY; a server of one's own needs none. What failed on the way (429 and 5xx, a broken
    connection, a server that is silent for `timeout` seconds) is tried `tries` times, and a Retry-After of up to
    PATIENCE seconds is waited for. `ask` and `stream` raise UserError where that did not help. Threads may share it.
    """

    def __init__(self, model: str, base_url: str = "", timeout: float = 120.0, tries: int = 6) -> None:
        from openai import OpenAI

        where = base_url or os.environ.get("OPENAI_BASE_URL", "")
        if where and not re.fullmatch(r"https?://[^/@\s?]+(/[^@\s?]*)?", where):
            raise SettingsError(f"--base_url {_plain(where)!r} is not an address such as http://127.0.0.1:8000/v1")
        if not where and not os.environ.get("OPENAI_API_KEY"):
            raise UserError(
                f"{model!r} at OpenAI needs a key: set OPENAI_API_KEY in the environment or in .env, or --base_url to "
                "an OpenAI-compatible server"
            )
        self.model, self.where, self.tries = model, _plain(where) or "api.openai.com", tries
        self.client = OpenAI(
            base_url=where or None,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            timeout=timeout,
            max_retries=tries - 1,
        )
        self.respelled: dict[str, str | None] = {}
        self.takes_system: bool | None = None  # not known yet

    def ask(self, messages: list[Message], **arguments: Any) -> Reply:
        """One reply. What comes back as no reply at all (no JSON, no choice, no text) is asked for again."""
        for attempt in range(self.tries):
            try:
                answer = self._create(messages, **arguments)
                choice = answer.choices[0]
                text, finish = choice.message.content or "", choice.finish_reason
            except (json.JSONDecodeError, AttributeError, IndexError, TypeError):  # a gateway's page, half an object
                text, finish = "", "malformed"
            if text or finish not in ("malformed", None):
                used = getattr(answer, "usage", None)
                counts = (getattr(used, name, 0) or 0 for name in ("prompt_tokens", "completion_tokens"))
                return Reply(text, finish != "length", *counts)
            if attempt < self.tries - 1:
                time.sleep(min(0.5 * 2**attempt, 8.0))
        raise UserError(f"{self.model} at {self.where} answers with what is no reply, {self.tries} times in a row")

    def stream(self, messages: list[Message], **arguments: Any) -> Iterator[str]:
        """The reply in pieces, as they come."""
        from openai import APIError

        try:
            for event in self._create(messages, stream=True, **arguments):
                if event.choices and (piece := event.choices[0].delta.content):
                    yield piece
        except APIError as error:  # broken off in the middle
            raise UserError(f"{self.where} broke off: {_line(error)}") from None

    def _create(self, messages: list[Message], **arguments: Any) -> Any:
        """A completion; what the server refuses is spelt as it wants it, or left out, and remembered."""
        from openai import APIConnectionError, APIStatusError

        create: Any = self.client.chat.completions.create
        fold_system_message, waited = False, 0
        while True:
            names = {name: self.respelled.get(name, name) for name in arguments}
            given = {new: arguments[name] for name, new in names.items() if new}
            system = messages[0]["role"] == "system" and self.takes_system is not False
            fold_system_message = fold_system_message or (messages[0]["role"] == "system" and not system)
            sent = prepend_system(messages) if fold_system_message else messages
            try:
                answer = create(model=self.model, messages=sent, **given)
            except APIConnectionError as error:  # a time-out is one
                raise UserError(f"no answer from {self.where}: {_line(error)} Is the server up?") from None
            except APIStatusError as error:
                refused = [n for n in ARGUMENT_ALIASES if n in given and _is_unknown(error, n)]
                wait = _told_to_wait(error)
                if error.status_code == 400 and refused:
                    self.respelled |= {name: ARGUMENT_ALIASES[name] for name in refused}
                    print(f"note: {self.model} takes no {', '.join(refused)}: {_line(error)}")
                elif (
                    error.status_code in (400, 422, 500)
                    and system
                    and self.takes_system is None
                    and not fold_system_message
                ):
                    fold_system_message = True  # the templates of Mistral, Gemma and others have no place for one
                elif wait and waited < self.tries:
                    waited += 1
                    print(f"{self.where} asks to wait {wait:.0f} s.", flush=True)
                    time.sleep(wait)
                else:
                    raise self._explain(error) from None
            else:
                if fold_system_message and self.takes_system is None:
                    print(f"note: {self.model} has no place for a system message: it opens the user's.")
                self.takes_system = False if fold_system_message else self.takes_system or system or None
                return answer

    def _explain(self, error: Any) -> UserError:
        status, said = error.status_code, _line(error)
        if status in (400, 413, 422):
            return Refused(f"{self.model} at {self.where} refuses the request: {said}")
        if status in (401, 403):
            return UserError(f"{self.where} does not take the key in OPENAI_API_KEY ({status})")
        if status == 404:
            return UserError(f"{self.where} has no model {self.model!r} (404): {self._models() or said}")
        if status == 429:
            return UserError(f"{self.where} asks to slow down (429), and went on asking: {said}")
        return UserError(f"{self.where} fails ({status}): {said}")

    def _models(self) -> str:
        try:
            names = [model.id for model in self.client.models.list()]
        except Exception:  # the first error says more
            return ""
        return f"it has {', '.join(names[:8])}" if names else ""


def run_parallel(jobs: Iterable[Job], work: Callable[[Job], Done], concurrency: int) -> Iterator[tuple[Job, Done]]:
    """(job, work(job)) of each as it is done, `concurrency` at a time; only as many are begun as are taken.

    An exception of `work` is raised here, after what the others had begun by then is done. The threads are daemons:
    after Ctrl-C nobody waits for a server that hangs.
    """
    waiting, done = iter(jobs), queue.SimpleQueue[tuple[Job, Any, BaseException | None]]()

    def run(job: Job) -> None:
        try:
            done.put((job, work(job), None))
        except BaseException as error:  # raised again, in the caller's thread
            done.put((job, None, error))

    running, failed = 0, None
    while True:
        while failed is None and running < concurrency:
            try:
                job = next(waiting)
            except StopIteration:
                break
            threading.Thread(target=run, args=(job,), daemon=True).start()
            running += 1
        if not running:
            break
        job, result, error = done.get()
        running -= 1
        if error is None:
            yield job, result
        failed = failed or error
    if failed:
        raise failed


def _is_unknown(error: Any, name: str) -> bool:
    """Whether a server says that it has no argument of this name; not whenever it speaks of it."""
    said = str(error.message)
    return getattr(error, "param", None) == name or bool(re.search(rf"\b{name}\b", said) and UNKNOWN.search(said))


def _told_to_wait(error: Any) -> float:
    """Seconds of a Retry-After that the client itself finds too long (above two minutes); else 0."""
    told = error.response.headers.get("Retry-After", "")
    seconds = float(told) if re.fullmatch(r"\d+(\.\d+)?", told) else 0.0
    return seconds if error.status_code in (429, 503) and 120 < seconds <= LONGEST_WAIT else 0.0


def _plain(address: str) -> str:
    """An address without what may be a password in it."""
    return re.sub(r"//[^/@]*@", "//", address).partition("?")[0]


def _line(error: Any) -> str:
    body = getattr(error, "body", None)
    said = body.get("message") if isinstance(body, dict) else None
    return " ".join(str(said or error).split())[:300]
