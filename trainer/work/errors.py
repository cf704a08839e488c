"""Unexpected errors of a job: their messages, with a remedy where one is known; and which a process cannot survive."""

from __future__ import annotations

from collections.abc import Iterator

OF_TRAINING = "try args micro_batch=1 gradient_checkpointing=true, a lower resolution or a lower rank"
OF_PICTURES = "try a smaller w and h, no super_resolution or hires_fix, or no controlnet"
# How torch's errors begin that come from the runtime, driver or libraries of an accelerator.
DEVICE_ERRORS = ("CUDA error", "CUDA driver error", "HIP error", "cuDNN error")
# After these the device can be used again: what was asked for was too much, or wrong. After any other it cannot
# (CUDA Runtime API, cudaError: "the process must be terminated and relaunched").
SURVIVABLE = (
    "out of memory", "ALLOC_FAILED", "invalid argument", "INVALID_VALUE", "BAD_PARAM", "NOT_SUPPORTED",
    "not supported", "no kernel image", "invalid configuration", "invalid device function", "invalid device ordinal",
)  # fmt: skip


class DeviceLost(Exception):
    """After an error of the device, this process can compute nothing more on it; a new process may."""


def explain(error: Exception, remedy: str = OF_TRAINING) -> str:
    """An unexpected error as a message, with a remedy where one is known. remedy: for a card that is full."""
    text = f"{type(error).__name__}: {error}".strip().rstrip(":")
    if type(error).__name__ == "OutOfMemoryError":
        return f"{text} -- the card's memory is full: {remedy}; or close what else uses the card"
    return text


def device_error(error: BaseException) -> str | None:
    """The first line of the error of the device that led to this one, where the process cannot survive that one."""
    return next((first_line(one) for one in chain(error) if is_fatal(one)), None)


def is_fatal(error: BaseException) -> bool:
    """Whether every later call of the device fails, too. Torch is not imported: the name of its class says enough."""
    classes = {one.__name__ for one in type(error).__mro__}  # AcceleratorError: torch 2.8 and later
    text = first_line(error)  # advice follows, which names other errors
    of_device = "AcceleratorError" in classes or ("RuntimeError" in classes and text.startswith(DEVICE_ERRORS))
    return of_device and "OutOfMemoryError" not in classes and not any(words in text for words in SURVIVABLE)


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that led to it."""
    left: list[BaseException | None] = [error]
    seen: list[BaseException] = []
    while left:
        one = left.pop(0)
        if one is not None and one not in seen:
            seen.append(one)
            yield one
            left += [one.__cause__, one.__context__]
