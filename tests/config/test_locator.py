"""Every key and value of a TOML text has its place."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from mtlbalance.config.locator import KeyPath, locate

TEXT = '''\
# a comment with [brackets] and = signs
plugins = ["a", # one
           'b']
run.name = "x # no comment"   # run.seed = 3

[balancer] # gaba
name = "gaba"
"quoted.key" = 1
weights = { rul = 0.5, "health" = { deep = [1, 2] } }

[training.inner]
text = """
several = lines"""
\tlr=1e-3

[[rows]]
a = 1
[[rows]]
a = 2
[rows.sub]
b = true
'''


@pytest.mark.parametrize(
    ("path", "key", "value"),
    [
        (("plugins",), (2, 1, 7), (2, 11, 11)),
        (("plugins", 0), None, (2, 12, 3)),
        (("plugins", 1), None, (3, 12, 3)),
        (("run",), (4, 1, 3), None),
        (("run", "name"), (4, 5, 4), (4, 12, 16)),
        (("balancer",), (6, 2, 8), None),
        (("balancer", "quoted.key"), (8, 1, 12), (8, 16, 1)),
        (("balancer", "weights", "rul"), (9, 13, 3), (9, 19, 3)),
        (("balancer", "weights", "health", "deep", 1), None, (9, 48, 1)),
        (("training", "inner", "text"), (12, 1, 4), (12, 8, 3)),
        (("training", "inner", "lr"), (14, 2, 2), (14, 5, 4)),
        (("rows", 0, "a"), (17, 1, 1), (17, 5, 1)),
        (("rows", 1, "a"), (19, 1, 1), (19, 5, 1)),
        (("rows", 1, "sub", "b"), (21, 1, 1), (21, 5, 4)),
    ],
)
def test_places(path: KeyPath, key: tuple[int, ...] | None, value: tuple[int, ...] | None) -> None:
    spans = locate(TEXT)
    for found, expected in ((spans.keys.get(path), key), (spans.values.get(path), value)):
        assert (found and (found.line, found.column, found.length)) == expected


def _leaves(value: Any, path: KeyPath = ()) -> list[tuple[KeyPath, Any]]:
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in _leaves(item, (*path, key))]
    return [(path, value)]


_VALUES = st.recursive(
    st.integers(-(2**40), 2**40) | st.booleans() | st.text(max_size=8) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)
_TABLES = st.recursive(
    st.dictionaries(st.text(min_size=1, max_size=6), _VALUES, max_size=3),
    lambda inner: st.dictionaries(st.text(min_size=1, max_size=6), inner | _VALUES, max_size=3),
    max_leaves=6,
)


@given(_TABLES)
def test_what_stands_at_a_place_is_the_value(table: dict[str, Any]) -> None:
    text = tomli_w.dumps(table)
    lines = text.split("\n")
    spans = locate(text)
    for path, value in _leaves(tomllib.loads(text)):
        span = spans.values[path]
        written = lines[span.line - 1][span.column - 1 : span.column - 1 + span.length]
        if not isinstance(value, list):  # a list may go on over several lines
            assert tomllib.loads(f"v = {written}") == {"v": value}
        key = spans.keys[path]
        assert tomllib.loads(lines[key.line - 1][key.column - 1 : key.column - 1 + key.length] + "=0") == {
            path[-1]: 0
        }


@given(st.text(alphabet="[]{}=\"'.,#\n ab1\\", max_size=40))
def test_a_broken_text_never_fails(text: str) -> None:
    locate(text)
