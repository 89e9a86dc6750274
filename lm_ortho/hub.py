"""Describes errors of the model hub in one line, with what to do, and hides access tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator

from lm_ortho.errors import ACCESS_TOKEN


def describe_hub_error(error: BaseException, name: object = "", revision: object = None) -> str:
    """One line about ``error``: what is wrong with the repository ``name`` on the hub, else its own message.

    transformers and peft wrap the error of the hub client, so the causes of ``error`` are searched as well.
    """
    messages = (_describe_cause(cause, name, revision) for cause in _causes(error))
    return next(filter(None, messages), None) or first_line(error)


MAX_MESSAGE = 300
"""Largest number of characters of another library's message inside one of ours."""


def first_line(error: BaseException) -> str:
    """The message as one line of at most 300 characters that ends with a sentence, or the class of the error.

    Lines are joined up to the first one that ends a sentence or a list, because a first line may only announce the
    reason. A longer message ends at a sentence, or else at a word and three dots.
    """
    # 1. Join the lines of the first paragraph: a line that ends with a colon or a comma goes on in the next one.
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    end = next((i for i, line in enumerate(lines) if not line.endswith((":", ",", "(", "[", "-"))), len(lines) - 1)
    text = " ".join(lines[: end + 1])
    if len(text) <= MAX_MESSAGE:
        return text
    # 2. Shorten it to whole sentences, else to whole words.
    sentence = text.rfind(". ", 0, MAX_MESSAGE)
    if sentence > 0:
        return text[: sentence + 1]
    head = text[: MAX_MESSAGE - 4]
    return (head.rpartition(" ")[0] or head) + " ..."


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _describe_cause(error: BaseException, name: object, revision: object) -> str | None:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):  # before its parent, a repository that is not there
        return f"gated: ask for access at https://huggingface.co/{name}, then log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such directory, and no such public repository on the hub; a private one needs `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"revision={str(revision)!r} is not there; give a branch, a tag or a commit of the repository"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return "no such directory, not downloaded before, and the hub cannot be reached (offline?)"
    if "trust_remote_code" in str(error):
        return "it brings code of its own; read it, then pass trust_remote_code=True (--trust-remote-code)"
    return None


_ACCESS_TOKEN = re.compile(rf"""(\btoken["']?\s*[=:]\s*["']?)[^\s,"'}}]+|{ACCESS_TOKEN.pattern}""")


def hide_access_tokens(text: str) -> str:
    """``text`` without access tokens of the hub, for what is stored or published: commands and model args."""
    return _ACCESS_TOKEN.sub(lambda match: f"{match[1] or ''}...", text)
