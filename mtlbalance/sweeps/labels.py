"""Labels of an axis's points: where they come from, and the folders that are named after them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mtlbalance.config import Override
from mtlbalance.config.document import SLOTS

RESERVED_FOLDERS = ("configs", "logs", "plan.json")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
MAX_LENGTH = 100  # a file's name may have 255 bytes, and a label is only a part of some


def is_label(label: Any) -> bool:
    """Return whether a folder can be named after it.

    >>> is_label("slow"), is_label("-0.5"), is_label("-x"), is_label("a/b")
    (True, True, False, False)
    """
    if not isinstance(label, str) or len(label) > MAX_LENGTH:
        return False
    return NAME.fullmatch(label.removeprefix("-") if is_number(label) else label) is not None


def default_label(overrides: Sequence[Override]) -> str:
    """Return the name of the plugin that a point chooses, or else its values."""
    for override in overrides:
        if len(override.keys) == 2 and override.keys[0] in SLOTS and override.keys[1] == "name":
            return str(override.value)
    text = "-".join(shown(override.value) for override in overrides)
    if is_number(text):
        return text.replace("+", "")  # 1e+20
    return re.sub(r"[^\w.-]+", "-", text, flags=re.ASCII).strip("-.") or "base"


def folder_of(axis: str, label: str) -> str:
    """Return a label as a folder's name: a number says what it is a number of.

    >>> folder_of("seed", "42"), folder_of("method", "gaba")
    ('seed_42', 'gaba')
    """
    return f"{axis}_{label}" if is_number(label) else label


def shown(value: Any) -> str:
    """Return a value as labels have it.

    >>> shown(True), shown(0.5), shown([1, 2])
    ('true', '0.5', '1-2')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "-".join(f"{key}-{shown(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "-".join(shown(item) for item in value)
    return str(value)


def is_number(text: str) -> bool:
    """Return whether a label is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True
