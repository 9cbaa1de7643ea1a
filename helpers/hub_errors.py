"""What the Hub answered when it did not give what was asked for, and what to do about it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
PATIENCE = 300.0  # seconds that are waited for a Hub that asks for it
ANSWERS = {
    401: "the Hub does not accept your token (401): give a valid one as HF_TOKEN, or none for what is public",
    403: "your token may not do that (403): give one with the right to, as HF_TOKEN",
    404: "it is not on the Hub, or your token may not see it (404)",
    429: "the Hub asks to slow down (429): give the same command again in some minutes",
}


def reason(error: BaseException) -> str:
    """One line; the error's own words where it is not the Hub's."""
    from huggingface_hub.errors import (
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) and before not in chain:
        chain.append(before)
    said = " ".join(str(error).split())[:300]
    if any(isinstance(e, RepositoryNotFoundError) for e in chain):
        return ANSWERS[404]  # without a token, a repository that is not there is answered with 401
    if any(isinstance(e, RevisionNotFoundError | RemoteEntryNotFoundError) for e in chain):
        return said
    answers = [answer for e in chain if (answer := getattr(e, "response", None)) is not None]
    status = answers[0].status_code if answers else 0
    full = next((line for e in chain for line in str(getattr(e, "server_message", "") or e).splitlines()
                 if re.search(r"storage|quota", line, re.IGNORECASE)), "")  # fmt: skip
    if status in (402, 403, 413) and full:
        return f"the account has no room for it ({' '.join(full.split())[:200]}): make some, or push elsewhere"
    if status >= 500:
        return f"the Hub fails ({status}): give the same command again later"
    if status in ANSWERS:
        return ANSWERS[status]
    if any(isinstance(e, LocalEntryNotFoundError | OfflineModeIsEnabled) for e in chain):
        from huggingface_hub import is_offline_mode

        if is_offline_mode():
            return "it is not in the cache, and HF_HUB_OFFLINE is set: leave it out once, or give a folder"
        return "it is not in the cache, and the Hub cannot be reached: connect, or give a folder"
    return said


def patiently(call: Callable[[], T], tries: int = 5) -> T:
    """`call`, again where the Hub asks to slow down, fails, or hangs up; waits as long as it is told to.

    What was uploaded before is not sent again: the Hub knows it by its content.
    """
    import httpx2 as httpx  # what huggingface_hub speaks through
    from huggingface_hub.errors import HfHubHTTPError

    for attempt in range(tries):
        try:
            return call()
        except (HfHubHTTPError, httpx.TransportError, RuntimeError) as error:  # an upload's is wrapped in the last
            cause = error.__cause__ if isinstance(error, RuntimeError) else error
            answer = cause.response if isinstance(cause, HfHubHTTPError) else None
            told = answer.headers.get("Retry-After", "") if answer is not None else ""
            wait = float(told) if re.fullmatch(r"\d+(\.\d+)?", told) else 2.0**attempt
            passing = isinstance(cause, httpx.TransportError)
            passing |= answer is not None and (answer.status_code == 429 or answer.status_code >= 500)
            if not passing or attempt == tries - 1 or wait > PATIENCE:
                raise
            print(f"The Hub {'is busy' if answer is not None else 'hung up'}: trying again in {wait:.0f} s.")
            time.sleep(wait)
    raise AssertionError("not reached")
