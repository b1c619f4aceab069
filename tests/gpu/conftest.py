"""The GPU of this machine, or one line that says why there is none."""

from collections.abc import Iterator

import pytest

from effopt.backends.cuda_driver import Device, Stream, available, device
from tests.gpu.timing import Times

TIMES = pytest.StashKey[Times]()


@pytest.fixture(scope="session")
def gpu() -> Device:
    here = available()
    if not here.ok:
        pytest.skip(here.reason)
    return device()


@pytest.fixture
def stream(gpu: Device) -> Iterator[Stream]:
    gpu.use()
    with Stream(gpu) as made:
        yield made


@pytest.fixture
def times(request: pytest.FixtureRequest) -> Times:
    """Collect times; all are shown at the end."""
    return request.config.stash.setdefault(TIMES, Times())


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Show the times as a table for docs/gpu.md, and as one line of JSON."""
    times = config.stash.get(TIMES, None)
    if times is not None:
        terminalreporter.section("times")
        terminalreporter.write_line(times.text())
