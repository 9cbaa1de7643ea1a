"""What answers: a model, an adapter on its base, or an endpoint; a batch at a time, or a word at a time."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from helpers.chat import end_tokens, folded, render, takes_system
from helpers.endpoint import Endpoint, Refused, in_parallel
from helpers.errors import SettingsError, UserError
from helpers.fields import RunSettings
from helpers.rows import Message

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Arguments that make of an answer something else than one text, or need more than a value.
WHOLE = {"num_return_sequences", "return_dict_in_generate", "stop_strings", "output_scores", "output_logits"}
TEXTS = {"cache_implementation", "early_stopping"}
SAMPLED = ("temperature", "top_p", "top_k")  # have a meaning when sampling only
PASSED_ON = ("top_k", "repetition_penalty")  # not OpenAI's: vLLM and others read them from the body


class Speaker(Protocol):
    """What answers: a model here, or one behind an endpoint."""

    def answer(self, conversations: list[list[Message]], seed: int, **sampling: Any) -> Sequence[str | None]:
        """One answer a conversation, in their order; None for one that is refused."""

    def say(self, conversation: list[Message], seed: int, **sampling: Any) -> str:
        """One answer, printed as it comes."""


def sampling_of(settings: RunSettings) -> dict[str, Any]:
    """The arguments of `model.generate` among the settings; those of sampling only when it samples.

    A temperature, top_p or top_k that was given means that it is to sample, a temperature of 0 that it is not. Raises
    SettingsError for a word of --generate that is not one of its arguments, and for values that it refuses.
    """
    from transformers import GenerationConfig

    own: Any = settings
    if not settings.given("do_sample") and any(settings.given(name) for name in SAMPLED):
        settings.adopt("sampling was asked for", do_sample=own.temperature > 0)
    if own.do_sample and not (own.temperature > 0 and 0 < own.top_p <= 1):
        raise SettingsError("--do_sample needs a --temperature above 0, and a --top_p above 0 and at most 1")
    names = ("max_new_tokens", "do_sample", "num_beams", "repetition_penalty")
    values, known = settings.values(), GenerationConfig().to_dict()
    more = {}
    for word in values["generate"]:
        name, equals, value = word.partition("=")
        if not equals or name not in known or name in WHOLE:
            close = difflib.get_close_matches(name, set(known) - WHOLE, n=1)
            raise SettingsError(f"--generate {word}: {f'did you mean {close[0]}=...?' if close else 'give NAME=VALUE'}")
        try:
            more[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except json.JSONDecodeError:
            if name not in TEXTS:
                raise SettingsError(f"--generate {word}: a number, a list, true or false is needed") from None
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

    sampling = {"eos_token_id": end_tokens(tokenizer, model.generation_config)} | sampling
    system = takes_system(tokenizer)
    texts = [render(tokenizer, folded(messages, system), prompt=True) for messages in conversations]
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


class LocalSpeaker:
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


class RemoteSpeaker:
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
        answers = dict(in_parallel(jobs, ask, len(jobs)))
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


def talk_with(speaker: Speaker, seed: int, lines: Iterable[str] | None = None, **sampling: Any) -> None:
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
