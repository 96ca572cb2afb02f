"""The wording of errors."""

from vitx.errors import VitxError, in_words


def test_the_kind_is_said_of_errors_that_are_not_its_own():
    assert in_words(VitxError("no cat")) == "no cat"
    assert in_words(KeyError("cat")) == "KeyError: 'cat'"
