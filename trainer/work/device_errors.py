"""Fatal errors of the device: after one, every later call of the device fails in this process."""

from __future__ import annotations

from trainer.contract.disk import chain

# Errors of the runtime, driver or libraries of an accelerator begin so.
DEVICE_ERRORS = ("CUDA error", "CUDA driver error", "HIP error", "cuDNN error")
# After these errors the device still works: a call asked for too much, or for something wrong. The others are fatal
# (CUDA Runtime API, cudaError: "the process must be terminated and relaunched").
NOT_FATAL = (
    "out of memory", "ALLOC_FAILED", "invalid argument", "INVALID_VALUE", "BAD_PARAM", "NOT_SUPPORTED",
    "not supported", "no kernel image", "invalid configuration", "invalid device function", "invalid device ordinal",
)  # fmt: skip


class DeviceLost(Exception):
    """A fatal error of the device, by its name. Only a new process can use the device again."""


def device_error(error: BaseException) -> str | None:
    """The first line of the fatal device error that is this error, or led to it; None if there is none."""
    return next((first_line(one) for one in chain(error) if is_fatal(one)), None)


def is_fatal(error: BaseException) -> bool:
    """Whether this is a fatal error of the device. Classes are compared by name, because the web side has no torch."""
    classes = {one.__name__ for one in type(error).__mro__}
    text = first_line(error)  # the other lines are advice, which names other errors
    of_device = "AcceleratorError" in classes or ("RuntimeError" in classes and text.startswith(DEVICE_ERRORS))
    return of_device and "OutOfMemoryError" not in classes and not any(part in text for part in NOT_FATAL)


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
