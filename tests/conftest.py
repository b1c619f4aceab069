"""Set-up of all tests: assertions of the tester are rewritten; seeds and threads are fixed."""

import pytest
import torch

pytest.register_assert_rewrite("tests.check")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
