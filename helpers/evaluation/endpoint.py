"""A model behind an OpenAI-compatible endpoint: what it is sent, what it replies, and what servers refuse."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing.pool import ThreadPool
from typing import Any, TypeVar

from helpers.core import SettingsError, UserError, printable
from helpers.data.formats import TEMPLATE_COLUMNS, template_columns
from helpers.data.messages import THOUGHT_KEYS, Message
from helpers.evaluation.answers import Generator
from helpers.evaluation.questions import Answer
from helpers.models.chat import EachOptions, fold_system_message

SAMPLING_ARGUMENTS = ("temperature", "top_p", "top_k")
BODY_ARGUMENTS = {"top_k": 50, "repetition_penalty": 1.0}  # vLLM and others read these from the body; their defaults
RENAMED = {"max_tokens": "max_completion_tokens"}  # what newer models call an argument; any other one is left out
OPTIONAL = ("seed", "n", *SAMPLING_ARGUMENTS, *BODY_ARGUMENTS)
UNKNOWN_ARGUMENT = re.compile(
    r"unsupported|not support|not accept|not allowed|unrecogni[sz]ed|unknown|unexpected|not permitted|extra_forbidden|"
    r"deprecated|instead|only the default|may only be|cannot be (?:set|used|specified)",
    re.IGNORECASE,
)
OUT_OF_RANGE = re.compile(r"must be|has to be|should be|out of range|greater than|less than", re.IGNORECASE)
# Values that a server may refuse and that change little; what `n` leaves out is asked for again.
NEUTRAL: dict[str, Sequence[float]] = {"temperature": (0.0, 1.0), "top_p": (1.0,), "n": range(2, 1000)}
EXCLUSIVE = re.compile(r"\bboth\b|only one|either|mutually exclusive|together|at the same time", re.IGNORECASE)
NO_MODEL = re.compile(r"\bmodel\b.{0,200}(?:not found|(?:does|do) not exist|doesn't exist)", re.IGNORECASE)
# What servers say of a request that is too long: the model's context, what is read, what is asked for in all, and the
# most that may be written. vLLM, SGLang, OpenAI, Anthropic, DeepSeek, Groq and TGI each have their own words.
CONTEXT = (
    r"context (?:length|size|window)\D{0,30}(\d+)|(\d+) maximum context|max_new_tokens\W*must be <=\W*(\d+)|"
    r"max_model_len\D*(\d+)"
)
READ = r"(\d+)\W+(?:in the (?:messages|prompt)|inputs?\b|prompt tokens|tokens (?:from|in) the (?:input|mess|prompt))"
IN_ALL = r"requested (?:a total of )?(\d+) tokens"
SUM = r"(\d+) \+ \d+ > (\d+)"  # read + asked for > the model's context
MOST_WRITTEN = r"(?:at most|less than or equal to|up to|<=|\[\d+,|>|(?:maximum|limit)(?: value)?(?: of| is)?)\W*(\d+)"
TOKENS = re.compile(r"max_\w*tokens|(?:output|completion|new|generated) tokens", re.IGNORECASE)
PASSING = r"(?i)rate.?limit|quota|overload|capacity|try again|time.?out|unavailable"  # errors within a reply
LASTING = r"(?i)invalid|context|unsupported|not.support|too (?:long|large)|exceed|bad.?request|maximum|refuse"
CUT = ("length", "max_tokens", "MAX_TOKENS", "model_length")  # finish reasons of a reply that reached max_tokens
FEW_REFUSALS = 3  # refusals without one answer, after which a server is asked for the shortest of answers
Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Reply:
    """A model's reply and the tokens used; 0 where the server does not report them."""

    text: str
    finished: bool  # False where the reply was cut off at max_tokens
    prompt_tokens: int
    completion_tokens: int
    thoughts: str = ""  # those that the server reports apart

    @property
    def answer(self) -> Answer:
        thoughts = f"<think>\n{self.thoughts}\n</think>\n\n" if self.thoughts else ""
        return Answer(thoughts + self.text.strip(), cut=not self.finished)


class RequestRefused(UserError):
    """The server refuses this one request: it is too long, or against its rules. Others may succeed."""


class _ServerError(Exception):
    """A status of 400 or more, or an error within a reply of status 200: the server's words, and their first line."""

    def __init__(self, status: int, body: Any, default: str = "") -> None:
        error = body.get("error", body) if isinstance(body, dict) else body
        fields = error if isinstance(error, dict) else {}
        said = fields.get("message") or fields.get("detail") or error or default
        self.status, self.text = status, said if isinstance(said, str) else json.dumps(said)
        self.line = " ".join(self.text.split())[:300]
        self.code, self.param = str(fields.get("code") or fields.get("type") or ""), str(fields.get("param") or "")
        super().__init__(self.line)

    @classmethod
    def of(cls, error: Any) -> _ServerError:
        return cls(error.status_code, error.body, error.message)


class Endpoint(Generator):
    """`model` at `base_url`, by default OPENAI_BASE_URL or OpenAI's own servers. Threads may share it.

    The key is OPENAI_API_KEY; your own server needs none. 429, 5xx, broken connections and `timeout` seconds of silence
    are tried `tries` times by openai's client, which honours a Retry-After of up to two minutes. `variables` of the
    chat template are sent with every conversation that is answered. `flag` is the one of the address, for errors.
    """

    in_batches = False

    def __init__(
        self,
        model: str,
        base_url: str = "",
        timeout: float = 120.0,
        tries: int = 6,
        variables: dict[str, Any] | None = None,
        flag: str = "--base_url",
    ) -> None:
        from openai import OpenAI

        url, key = base_url or os.environ.get("OPENAI_BASE_URL", ""), os.environ.get("OPENAI_API_KEY", "")
        where = re.sub(r"//[^/@]*@", "//", url).partition("?")[0]  # without what may be a password
        if url and not re.fullmatch(r"https?://[^/@\s?]+(/[^@\s?]*)?", url):
            flag = flag if base_url else "OPENAI_BASE_URL"
            raise SettingsError(f"{flag} {where!r} is not an address such as http://127.0.0.1:8000/v1")
        if not url and not key:
            fix = f"set OPENAI_API_KEY in the environment or in .env, or {flag} to an OpenAI-compatible server"
            raise UserError(f"{model!r} at OpenAI needs a key: {fix}")
        self.model, self.where, self.tries = model, where or "api.openai.com", tries
        self.variables = variables or {}
        self.client = OpenAI(base_url=url or None, api_key=key or "none", timeout=timeout, max_retries=tries - 1)
        self.renamed: dict[str, str | None] = {}  # arguments that this model calls otherwise, or does not accept
        self.supports_system: bool | None = None  # not known yet
        self.most_written = 1 << 60  # tokens that this model may write at most, once the server has said so
        self._lock, self._printed = threading.RLock(), set[str]()
        self._refusals, self._has_answered = 0, False

    def generate(
        self, conversations: list[list[Message]], seed: int = 0, options: EachOptions = None, **kwargs: Any
    ) -> list[Answer]:
        """The conversations of a batch are sent at the same time, each with the tools and variables in its `options`.

        Its variables replace those of the same names in `variables`.
        """
        arguments, given = _to_openai(kwargs) | {"seed": seed}, self._columns(options or [{}] * len(conversations))
        answers = [Answer("")] * len(conversations)

        def answer(i: int) -> None:
            try:
                answers[i] = self.ask(conversations[i], **arguments, **given[i]).answer
            except RequestRefused as error:
                answers[i] = Answer("", refused=str(error))

        list(run_parallel(range(len(conversations)), answer, len(conversations)))
        return answers

    def sample(
        self, conversations: list[list[Message]], seeds: list[list[int]], options: EachOptions = None, **kwargs: Any
    ) -> list[list[Answer]]:
        """Answers are asked for with `n`. Those that the server leaves out or that are empty are asked for again, until
        two requests in a row have no text. An answer that is still missing is empty."""
        arguments, columns = _to_openai(kwargs), self._columns(options or [{}] * len(conversations))
        answers: list[list[Answer]] = [[] for _ in conversations]

        def answer(i: int) -> None:
            own, misses = answers[i], 0
            try:
                while (left := len(seeds[i]) - len(own)) and misses < 2:
                    given = {"seed": seeds[i][-left] + misses} | ({"n": left} if left > 1 else {})
                    replies = self.ask_several(conversations[i], **arguments | given | columns[i])
                    new = [reply.answer for reply in replies[:left] if reply.answer.strip()]
                    misses = 0 if new else misses + 1
                    own += new
                own += [Answer("")] * left
            except RequestRefused as error:
                own += [Answer("")] * left if own else [Answer("", refused=str(error))]

        list(run_parallel(range(len(conversations)), answer, len(conversations)))
        return answers

    def _columns(self, options: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [template_columns({**self.variables, **own}) for own in options]

    def ask(self, messages: list[Message], **arguments: Any) -> Reply:
        """One reply, with the errors of `ask_several`."""
        return self.ask_several(messages, **arguments)[0]

    def ask_several(self, messages: list[Message], **arguments: Any) -> list[Reply]:
        """The replies to one request, usually one, and several with `n`. Only the first counts the tokens. Raises
        RequestRefused if the server refuses this request, UserError if it refuses all of them."""
        try:
            replies = self._ask(messages, **arguments)
        except RequestRefused as error:
            with self._lock:
                self._refusals += 1
                is_suspicious = self._refusals == FEW_REFUSALS and not self._has_answered
            if is_suspicious:
                try:
                    self._ask([{"role": "user", "content": "Hello"}], **arguments)
                except RequestRefused:
                    raise UserError(f"every request so far was refused: {error}") from None
            raise
        self._has_answered = True
        return replies

    def _ask(self, messages: list[Message], **arguments: Any) -> list[Reply]:
        """A malformed reply (no JSON, no choice, no text) and one with a passing error is asked for again."""
        problem = f"sent {self.tries} malformed replies in a row"
        for attempt in range(self.tries):
            time.sleep(min(0.5 * 2**attempt, 8.0) if attempt else 0)
            try:
                reply = self._create(messages, **arguments)
                choices = [(*_read_message(choice.message), choice.finish_reason) for choice in reply.choices]
                refusal = choices[0][2]
            except _ServerError as error:
                problem = f"fails ({error.status}): {error.line}"
                continue
            except (json.JSONDecodeError, AttributeError, IndexError, TypeError):  # a gateway's page, half an object
                continue
            kept = [each for each in choices if not each[2] and each[3] != "content_filter"]
            if not kept:
                raise RequestRefused(f"{self.model} at {self.where} refuses to answer: {refusal or 'content filter'}")
            if any(text or thoughts or end for text, thoughts, _, end in kept):
                usage = getattr(reply, "usage", None)
                read, written = (getattr(usage, f"{kind}_tokens", 0) or 0 for kind in ("prompt", "completion"))
                return [
                    Reply(text, end not in CUT, read * (i == 0), written * (i == 0), thoughts)
                    for i, (text, thoughts, _, end) in enumerate(kept)
                ]
        raise UserError(f"{self.model} at {self.where} {problem}")

    def _create(self, messages: list[Message], **arguments: Any) -> Any:
        """A completion. What the server refuses is changed, as long as it says how: an argument that it does not know
        is renamed or left out, `max_tokens` is lowered to what fits, a system message is moved into the first turn."""
        from openai import APIConnectionError, APIStatusError

        create: Any = self.client.chat.completions.create
        has_system, fold = messages[0]["role"] == "system", self.supports_system is False
        most = min(arguments.get("max_tokens", 0), self.most_written)
        while True:
            given = arguments | ({"max_tokens": most} if most else {})
            sent = {new: value for name, value in given.items() if (new := self.renamed.get(name, name))}
            body = {name: value for name, value in sent.items() if name in (*BODY_ARGUMENTS, TEMPLATE_COLUMNS[1])}
            options = {name: value for name, value in sent.items() if name not in body}
            options |= {"extra_body": body} if body else {}
            try:
                reply = create(model=self.model, messages=fold_system_message(messages, not fold), **options)
                _raise_error_within(reply)
            except APIConnectionError as broken:  # a timeout is one
                line = " ".join(str(broken).split())[:300]
                raise UserError(f"no answer from {self.where}: {line} Is the server up?") from None
            except (APIStatusError, _ServerError) as caught:
                error = caught if isinstance(caught, _ServerError) else _ServerError.of(caught)
                fits = _fitting_tokens(error.text, most)
                if 0 < fits < most and error.status < 500:
                    self._note(f"allows fewer than {most} new tokens; using {fits}: {error.line}", key="fits")
                    most = fits
                    if not re.search(CONTEXT, error.text):  # it does not depend on the prompt
                        self.most_written = fits
                elif error.status in (400, 422) and (refused := _refused_arguments(error, sent)):
                    self.renamed |= {name: RENAMED.get(name) for name in refused}
                    fixes = {n: f"sent as {RENAMED[n]}" if n in RENAMED else "left out" for n in refused}
                    names = ", ".join(f"{name} ({fix})" for name, fix in fixes.items())
                    self._note(f"does not accept {names}: {error.line}", key=str(refused))
                elif error is caught and (error.status in (408, 409, 429) or error.status >= 500):
                    raise  # it may pass, and the client has not seen it
                elif error.status in (400, 422, 500) and has_system and not fold and not self.supports_system:
                    fold = True  # the templates of Mistral, Gemma and others have no system role
                else:
                    raise self._explain(error) from None
                continue
            if has_system:
                self.supports_system = not fold
            return reply

    def _note(self, text: str, key: str) -> None:
        """Print a note, once for each key."""
        with self._lock:
            if key not in self._printed:
                self._printed.add(key)
                print(printable(f"note: {self.model} {text}"))

    def _explain(self, error: _ServerError) -> UserError:
        status, line = error.status, error.line
        if status in (401, 403):
            return UserError(f"{self.where} does not accept the key in OPENAI_API_KEY ({status})")
        if status == 404 or error.code == "model_not_found" or NO_MODEL.search(line):
            try:
                names = [model.id for model in self.client.models.list()]
                line = f"it has {', '.join(difflib.get_close_matches(self.model, names, 8, 0.3) or names[:8])}"
            except Exception:  # the first error says more
                line += "" if self.where.endswith("/v1") else " (does the address end in /v1?)"
            return UserError(f"{self.where} has no model {self.model!r} ({status}): {line}")
        if status in (400, 413, 422):
            return RequestRefused(f"{self.model} at {self.where} refuses the request: {line}")
        problem = "still asks to slow down" if status == 429 else "fails"
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
    return arguments | {n: kwargs[n] for n, usual in BODY_ARGUMENTS.items() if kwargs.get(n, usual) != usual}


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


def _raise_error_within(reply: Any) -> None:
    """Raise the error that a gateway has put into a reply with status 200."""
    fields, choices = getattr(reply, "model_extra", None) or {}, getattr(reply, "choices", None) or ()
    body = fields.get("error") or next((e for c in choices if (e := (c.model_extra or {}).get("error"))), None)
    if not body and not choices and (fields.get("message") or fields.get("detail")):
        body = fields
    if not body:
        return
    error = _ServerError(500, body)
    if re.fullmatch(r"[45]\d\d", code := str(error.code)):
        error.status = int(code)
    elif re.search(PASSING, error.text):
        error.status = 429
    elif NO_MODEL.search(error.line):
        error.status = 404
    elif re.search(LASTING, error.text):
        error.status = 400
    raise error


def _read_message(message: Any) -> tuple[str, str, str]:
    """The text of a message with its tool calls, its thoughts and its refusal. The content may be a list of parts of
    several types."""
    thoughts = next((text for key in THOUGHT_KEYS if (text := _join_parts(getattr(message, key, None)))), "")
    parts = message.content if isinstance(message.content, list) else [message.content]
    kinds = [str(part.get("type")) if isinstance(part, dict) else "text" for part in parts]
    texts = list(zip(kinds, map(_join_parts, parts), strict=True))
    thoughts += "".join(text for kind, text in texts if re.search("think|reason", kind))
    refusal = getattr(message, "refusal", None) or "".join(text for kind, text in texts if kind == "refusal")
    text = "".join(text for kind, text in texts if not re.search("think|reason|refusal", kind))
    calls = [json.dumps({"name": c.function.name, "arguments": c.function.arguments}) for c in message.tool_calls or []]
    return "\n".join([text, *(f"<tool_call>{call}</tool_call>" for call in calls)]).strip("\n"), thoughts, refusal


def _join_parts(part: Any) -> str:
    """The text within a string, a list or an object."""
    if isinstance(part, dict):
        keys = ("text", "value", "content", "summary", "refusal", *THOUGHT_KEYS)
        return next((text for key in keys if (text := _join_parts(part.get(key)))), "")
    return "".join(map(_join_parts, part)) if isinstance(part, list) else part if isinstance(part, str) else ""


def _refused_arguments(error: _ServerError, sent: dict[str, Any]) -> list[str]:
    """The arguments that a server does not know, or does not accept here; those that it only mentions are not."""
    named = [n for n in (*OPTIONAL, *RENAMED) if n in sent and (n == error.param or re.search(rf"\b{n}\b", error.text))]
    if {"temperature", "top_p"} <= {*named} and EXCLUSIVE.search(error.text):
        return ["temperature" if sent["temperature"] == 1 != sent["top_p"] else "top_p"]
    is_unknown = UNKNOWN_ARGUMENT.search(f"{error.code} {error.text}")
    is_value = OUT_OF_RANGE.search(error.text)
    return [n for n in named if is_unknown or (is_value and sent[n] in NEUTRAL.get(n, ()))]


def _fitting_tokens(text: str, asked: int) -> int:
    """The `max_tokens` for which a server's message says that there is room; 0 if it does not say that."""
    text = re.sub(r"(?<=\d)[,_](?=\d{3}\b)", "", text)

    def number(pattern: str, group: int = 0) -> int:
        found = re.search(pattern, text, re.IGNORECASE)
        numbers = [int(digits) for digits in found.groups() if digits] if found else [0]
        return numbers[group]

    if re.search(SUM, text):
        return number(SUM, 1) - number(SUM)
    if context := number(CONTEXT):
        read = number(READ) or number(IN_ALL) - asked
        return context - read if read > 0 else 0
    return number(MOST_WRITTEN) if TOKENS.search(text) else 0
