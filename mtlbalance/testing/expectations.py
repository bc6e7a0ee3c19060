"""What a check says: expected this, found that."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SHORT = 6  # numbers of a tensor that are shown in full
_MACHINERY = (str(Path(__file__).parent), str(Path(torch.__file__).parent))


class NotKeptError(AssertionError):
    """A promise that is not kept; the text says what was expected and what was found."""


def expect(kept: object, finding: str) -> None:
    """Raise unless ``kept``; ``finding`` says what was expected and what was found."""
    if not kept:
        raise NotKeptError(finding)


def expect_close(found: Any, expected: Any, what: str, *, rtol: float = 1e-5, atol: float = 1e-7) -> None:
    """Raise unless two numbers, tensors, or dicts of numbers agree; NaN equals NaN."""
    if isinstance(found, dict):
        expect(list(found) == list(expected), f"{what}: expected {_show(expected)}; found {_show(found)}")
    a, b = _numbers(found), _numbers(expected)
    agree = a.shape == b.shape and torch.allclose(a, b, rtol=rtol, atol=atol, equal_nan=True)
    far = ""
    if not agree and a.shape == b.shape and a.numel() > _SHORT:
        far = f" (largest difference {float((a - b).abs().max()):.3g})"
    expect(agree, f"{what}: expected {_show(expected)}; found {_show(found)}{far}")


def expect_equal(found: Any, expected: Any, what: str) -> None:
    """Raise unless two values are the same to the last bit; NaN equals NaN."""
    expect(_same(found, expected), f"{what}: expected {_show(expected)}; found {_show(found)}")


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape
        return alike and bool(((one == other) | (one.isnan() & other.isnan())).all())
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and _same(list(one.values()), list(other.values()))
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other or (one != one and other != other))


def expect_error(kind: type[BaseException], says: str, what: str, call: Callable[[], object]) -> None:
    """Raise unless ``call`` raises ``kind`` with ``says`` in its text; ``what`` names the mistake that it makes."""
    try:
        call()
    except kind as error:
        expect(says in str(error), f"{what}: expected an error that says {says!r}; it says {str(error)!r}")
    except Exception as error:
        raise NotKeptError(
            f"{what}: expected {kind.__name__}; it raised {type(error).__name__}: {error} ({where(error)})"
        ) from error
    else:
        raise NotKeptError(f"{what}: expected {kind.__name__} that says {says!r}; nothing was raised")


def _numbers(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().double()
    return torch.tensor(list(value.values()) if isinstance(value, dict) else value, dtype=torch.float64)


def _show(value: Any) -> str:
    if isinstance(value, Tensor):
        if value.numel() <= _SHORT:
            return f"{value.detach().tolist()}"
        norm = float(value.detach().double().norm())
        return f"a tensor of shape {tuple(value.shape)} and norm {norm:.6g}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_show(item)}" for key, item in value.items()) + "}"
    return repr(value)


def where(error: BaseException) -> str:
    """Return ``file:line`` of the plugin's own line that raised, or of the check's where there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    foreign = [frame for frame in frames if not frame.filename.startswith(_MACHINERY)]
    frame = (foreign or frames)[-1]
    return f"{frame.filename}:{frame.lineno}"
