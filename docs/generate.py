"""Write the tables of methods into docs/methods.md and README.md from the registered classes themselves.

python docs/generate.py            # write
python docs/generate.py --check    # exit 1 if a table is out of date
"""

from __future__ import annotations

import sys
from pathlib import Path

from mtlbalance.balancers.base import Balancer
from mtlbalance.balancers.facts import FACT_HEADINGS, method_facts
from mtlbalance.plugins.manager import load_plugins
from mtlbalance.plugins.references import resolve_build
from mtlbalance.slots import TaskSpec

ROOT = Path(__file__).resolve().parents[1]
TASKS = [TaskSpec("a", "regression", "mse"), TaskSpec("b", "classification", "cross_entropy", 3)]
REQUIRED = {"biased_task": "a", "target_cap": 1.0}  # placeholders for options without a default


def built_in_balancers() -> dict[str, tuple[Balancer, str]]:
    """Return a default instance of each built-in balancer and its one-line summary, by config name."""
    registry = load_plugins(entry_points=False)
    found: dict[str, tuple[Balancer, str]] = {}
    for name in registry.names("balancer"):
        registration = registry.get("balancer", name)
        fields = registration.config.model_fields
        options = registration.config(**{key: value for key, value in REQUIRED.items() if key in fields})
        found[name] = (resolve_build(registration)(options, TASKS), registration.summary)
    return found


def table(columns: dict[str, str]) -> str:
    """Return a Markdown table with a row a method; ``columns`` maps facts to headings."""
    lines = [
        "| class | config name | " + " | ".join(columns.values()) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for name, (balancer, summary) in built_in_balancers().items():
        facts = method_facts(balancer) | {"summary": summary.rstrip(".")}
        cells = " | ".join(facts[key] for key in columns)
        lines.append(f"| `{type(balancer).__name__}` | `{name}` | {cells} |")
    return "\n".join(lines)


def with_block(text: str, name: str, content: str) -> str:
    """Return ``text`` with what stands between ``<!-- name -->`` and ``<!-- end -->`` replaced."""
    start, end = f"<!-- {name} -->\n", "\n<!-- end -->"
    before, rest = text.split(start, 1)
    _, after = rest.split(end, 1)
    return before + start + content + end + after


def main() -> int:
    """Write or check both files; return the exit code."""
    short = {"summary": "what it does", "reads": "reads", "passes": "passes", "heads": "heads"}
    stale = []
    for path, columns in ((ROOT / "README.md", short), (ROOT / "docs" / "methods.md", FACT_HEADINGS)):
        before = path.read_text(encoding="utf-8")
        after = with_block(before, "methods", table(columns))
        if before != after:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(after, encoding="utf-8")
    if stale and "--check" in sys.argv:
        print(f"out of date: {', '.join(stale)}; run python docs/generate.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
