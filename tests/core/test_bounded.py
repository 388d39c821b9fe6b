"""Limits on users' programs: what runs over is stopped with one line, and everything is as it was afterwards."""

from __future__ import annotations

import re
import resource
import signal
import threading
import time
from typing import Any

import pytest

from unclipped.core.bounded import bounded, check_format, rendered
from unclipped.core.errors import DataError, UsageError

BACKTRACKS = re.compile("(a+)+$")


@pytest.fixture(autouse=True)
def everything_is_restored() -> Any:
    before = signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)
    yield
    assert (signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)) == before


def endless() -> None:
    while True:
        pass


def test_an_endless_loop_ends_at_the_limit() -> None:
    with pytest.raises(DataError, match=r"^template x: runs longer than 0\.05 s"), bounded("template x", seconds=0.05):
        endless()


def test_a_regular_expression_that_backtracks_ends_at_the_limit() -> None:
    start = time.monotonic()
    limit = bounded("cluster", seconds=0.05, memory=None, error=UsageError)
    with pytest.raises(UsageError, match=r"cluster: runs longer than 0\.05 s"), limit:
        BACKTRACKS.search("a" * 60 + "b")
    assert time.monotonic() - start < 2


def test_an_allocation_ends_at_the_limit() -> None:
    with pytest.raises(DataError, match="template x: needs more than 1 GB of memory"), bounded("template x"):
        "x" * (1 << 34)


def test_in_another_thread_the_limit_holds_too() -> None:
    caught: list[BaseException] = []

    def work() -> None:
        try:
            with bounded("template x", seconds=0.05):
                endless()
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(5)
    assert [str(error) for error in caught] == ["template x: runs longer than 0.05 s, which is the limit; simplify it"]


def test_the_inner_of_two_limits_is_named_when_it_is_the_tighter_one() -> None:
    outer, inner = bounded("outer", seconds=5), bounded("inner", seconds=0.05)
    with pytest.raises(DataError, match=r"^inner: runs longer"), outer, inner:
        endless()


def test_the_outer_of_two_limits_holds_inside_the_inner_one() -> None:
    outer, inner = bounded("outer", seconds=0.05), bounded("inner", seconds=5)
    with pytest.raises(DataError, match=r"^outer: runs longer"), outer, inner:
        endless()


def test_a_timer_that_ran_before_keeps_its_deadline() -> None:
    rang: list[float] = []
    start = time.monotonic()
    before_handler = signal.signal(signal.SIGALRM, lambda *_: rang.append(time.monotonic() - start))
    before = signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with bounded("quick", seconds=5):
            time.sleep(0.01)
        assert rang == []
        with bounded("slow", seconds=5):
            time.sleep(0.2)
        assert [0.09 < seconds < 0.19 for seconds in rang] == [True]
    finally:
        signal.signal(signal.SIGALRM, before_handler)
        signal.setitimer(signal.ITIMER_REAL, *before)


def test_errors_inside_pass_through() -> None:
    with pytest.raises(KeyError), bounded("x"):
        {}["a"]


def test_a_limit_costs_little() -> None:
    start = time.perf_counter()
    for _ in range(200):
        with bounded("x"):
            pass
    assert (time.perf_counter() - start) / 200 < 1e-3, "each rendering is wrapped"


def test_a_long_rendering_is_refused() -> None:
    with pytest.raises(DataError, match=r"chat template of x: writes 2,000,000 characters .* the limit is 1,000,000"):
        rendered("chat template of x", lambda: "x" * 2_000_000)


@pytest.mark.parametrize(
    "text",
    [
        "{answer:>999999999}", "{answer:.999999999f}", "{answer!r}", "{answer.__class__}", "{answer[0]}", "{other}",
        "{}", "{", "{answer:{answer}}", "{0}",
    ],
)  # fmt: skip
def test_a_format_that_is_more_than_plain_fields_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        check_format(text, ("answer",))


def test_plain_fields_and_doubled_braces_are_fine() -> None:
    check_format("{{a}} {question}: {choices}", ("question", "choices"))
    check_format("a photo of a {}", ("",))
