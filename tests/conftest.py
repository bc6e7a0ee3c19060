"""What every test process starts from."""

import os

from hypothesis import settings

# Read by OpenMP when torch is imported: test processes that spin while they wait starve one another.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

pytest_plugins = ["compatibility"]

# How long an example takes says more about what else the machine does than about the code.
settings.register_profile("mtlbalance", deadline=None)
settings.load_profile("mtlbalance")
