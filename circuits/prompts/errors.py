"""What is wrong with a prompt rather than with the work on it."""

from __future__ import annotations


class InputError(ValueError):
    """A prompt that cannot be run as it is: too long, too large, its numbers overflow.

    Who works on many prompts may go on without it; any other error is a fault of theirs or ours.
    """
