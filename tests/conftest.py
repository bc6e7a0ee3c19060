"""What every test process starts from."""

import os
import signal
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

# Read by OpenMP when torch is imported: test processes that spin while they wait starve one another.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A shell that starts the tests in the background has them ignore Ctrl-C, and every process that they start, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["compatibility"]

# How long an example takes says more about what else the machine does than about the code.
settings.register_profile("mtlbalance", deadline=None)
settings.load_profile("mtlbalance")


@pytest.fixture(autouse=True, scope="session")
def _a_cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Leave the user's cache folder alone; the tests of one process share another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def clean_imports() -> Iterator[None]:
    """Forget the modules that a test's plugins brought, so that tests may reuse names."""
    modules, path = set(sys.modules), list(sys.path)
    yield
    for name in set(sys.modules) - modules:
        if name.startswith("acme"):
            del sys.modules[name]
    sys.path[:] = path
