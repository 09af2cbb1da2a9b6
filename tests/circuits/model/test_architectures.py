"""The page on architectures is what the tests find: same features, no larger deviations."""

from __future__ import annotations

import re

from circuits.model.families import FAMILIES
from tests import architectures, tiny

NUMBER = re.compile(r"\| (\de-\d+|0) (?=\|)")


def test_the_page_is_what_the_tests_find():
    """Deviations may be ten times larger on another machine; everything else is equal, character by
    character.
    """
    written, made = architectures.PAGE.read_text(), architectures.page()
    assert NUMBER.sub("| N ", written) == NUMBER.sub("| N ", made), "run `make docs`"
    stated, found = (NUMBER.findall(page) for page in (written, made))
    assert len(stated) == len(found) == 3 * len(FAMILIES)
    for at_most, measured in zip(stated, found, strict=True):
        assert float(measured) <= 10 * float(at_most) * (1 + 1e-9)


def test_every_family_is_on_the_page_and_has_a_small_model():
    assert {family.architecture for family in architectures.FAMILIES.values()} == set(FAMILIES)
    assert set(architectures.FAMILIES) == {*tiny.HUGGINGFACE, "native"}


def test_one_digit_rounds_up():
    given = (0.9, 0.01, 0.011, 3.1e-16, 9.7e-7, 0.0)
    assert [architectures.one_digit(value) for value in given] == [
        "9e-1",
        "1e-2",
        "2e-2",
        "4e-16",
        "1e-6",
        "0",
    ]
