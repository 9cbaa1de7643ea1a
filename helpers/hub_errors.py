"""What the Hub answered when it did not give what was asked for, and what to do about it."""

from __future__ import annotations

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
    if status >= 500:
        return f"the Hub fails ({status}): give the same command again later"
    if status in ANSWERS:
        return ANSWERS[status]
    if any(isinstance(e, LocalEntryNotFoundError | OfflineModeIsEnabled) for e in chain):
        return "it is not in the cache, and the Hub cannot be reached: connect once, or leave out HF_HUB_OFFLINE"
    return said
