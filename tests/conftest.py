"""What all tests share: where recorded data lies, and where GPU kernels run: on a GPU, or in Triton's interpreter.

The interpreter must be chosen before anything imports triton, which libraries do: so here, for every test.
"""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def test_data() -> Callable[[str], Path]:
    """test_data("fixtures/x") -> its path in the data folder (GDN_TEST_DATA, default `../shared`); skips where it is absent."""
    folder = Path(os.environ.get("GDN_TEST_DATA") or REPOSITORY.parent / "shared")

    def find(relative: str) -> Path:
        path = folder / relative
        if not path.exists():
            pytest.skip(f"no {relative} in the test data folder {folder} (set GDN_TEST_DATA)")
        return path

    return find
