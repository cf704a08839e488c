"""The threads that act again and again."""

from __future__ import annotations

import threading
import time

import pytest

from trainer.clock import Loop

PATIENCE = 30.0  # seconds; only a hang is that slow


def test_a_loop_acts_again_after_errors_and_logs_them(caplog: pytest.LogCaptureFixture) -> None:
    done, times = threading.Event(), []

    def act() -> None:
        times.append(time.monotonic())
        if len(times) < 3:
            raise ValueError("a full disk")
        done.set()

    loop = Loop("sweeper", 0.01, act, retry_seconds=0.1)
    loop.start()
    assert done.wait(PATIENCE)
    loop.close()
    assert len(times) >= 3 and times[2] - times[0] >= 0.2  # the wait after an error
    assert "sweeper" in caplog.text and "a full disk" in caplog.text


def test_an_event_wakes_a_loop_and_closing_does() -> None:
    wake, acted = threading.Event(), threading.Semaphore(0)
    loop = Loop("sleeper", 3600, acted.release, wake=wake)
    loop.start()
    assert acted.acquire(timeout=PATIENCE)  # at once
    deadline = time.monotonic() + PATIENCE
    while not acted.acquire(timeout=0.05) and time.monotonic() < deadline:
        wake.set()
    assert time.monotonic() < deadline
    started = time.monotonic()
    loop.close()
    assert time.monotonic() - started < PATIENCE
    assert not any(thread.name == "sleeper" for thread in threading.enumerate())


def test_a_loop_that_is_closed_at_once_has_acted_once() -> None:
    acted: list[int] = []
    for number in range(50):
        loop = Loop("short", 3600, lambda number=number: acted.append(number))
        loop.start()
        loop.close(PATIENCE)
    assert acted == list(range(50))


def test_a_loop_that_never_began_closes() -> None:
    Loop("none", 1, lambda: None).close()
