"""Read by OpenMP when torch is imported: test processes that spin while they wait starve one another."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
