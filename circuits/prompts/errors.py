"""What is wrong with a prompt rather than with the work on it."""

from __future__ import annotations

LONGEST_QUOTE = 60  # characters of a value that a message repeats


class InputError(ValueError):
    """A prompt that cannot be run as it is: too long, too large, its numbers overflow.

    Who works on many prompts may go on without it; any other error is a fault of theirs or ours.
    """


def quote(value: object) -> str:
    """The beginning of a value's `repr`, in one line."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or an integer of too many digits
        return f"{type(value).__name__} too large to show"
    return text if len(text) <= LONGEST_QUOTE else text[: LONGEST_QUOTE - 3] + "..."
