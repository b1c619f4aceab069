"""Set-up of all tests: assertions of the tester are rewritten; seeds and threads are fixed."""

from pathlib import Path

import pytest
import torch

from tests.fake_cuda import Fake, compile_fake, copied

pytest.register_assert_rewrite("tests.check")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def cuda_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in for CUDA's driver, compiled once."""
    return compile_fake(tmp_path_factory.mktemp("fake"))


@pytest.fixture
def fake(cuda_library: Path, tmp_path: Path) -> Fake:
    """A stand-in of its own for one test, as it keeps a record."""
    return copied(cuda_library, tmp_path)
