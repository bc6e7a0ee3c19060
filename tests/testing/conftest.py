"""Broken plugins are modules of their own, found by name, so that what they hold can be pickled."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
