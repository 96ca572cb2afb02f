"""The processes that draw and write: in order, bounded, an error in one told, one that was ended, too."""

import os
import signal
import time

import pytest

from vitx import VitxError
from vitx.cli.writers import Writers


def slow(held, number):
    time.sleep(0.05 if number % 2 else 0)
    return held, number, os.getpid()


def failing(held, number):
    if number == 3:
        raise VitxError("the third cannot be written")
    return number


def ended(held):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def writers(request):
    made = Writers("held", request.param, 4)
    yield made
    made.close()


@pytest.mark.parametrize("writers", [0, 2], indirect=True)
def test_told_in_the_order_given(writers):
    found = []
    for number in range(10):
        writers.do(found.append, slow, number)
        assert number - len(found) < 5, "more wait than may"
    writers.finish()
    assert [one[:2] for one in found] == [("held", number) for number in range(10)]


@pytest.mark.parametrize("writers", [2], indirect=True)
def test_in_other_processes(writers):
    found = []
    for number in range(4):
        writers.do(found.append, slow, number)
    writers.finish()
    assert os.getpid() not in {process for _, _, process in found}


@pytest.mark.parametrize("writers", [0, 2], indirect=True)
def test_an_error_in_one_is_told(writers):
    found = []

    def all_ten():
        for number in range(10):
            writers.do(found.append, failing, number)

    with pytest.raises(VitxError, match="the third cannot be written"):
        all_ten()
    assert found == [0, 1, 2]


@pytest.mark.parametrize("writers", [2], indirect=True)
def test_one_that_was_ended(writers):
    writers.do(print, ended)
    with pytest.raises(VitxError, match=r"was killed, .* continue with --resume"):
        writers.finish()
