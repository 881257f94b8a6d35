"""Fixtures of the Hugging Face tests; see `hf_testing`."""

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("transformers")

from hf_testing import make, model, recorded, recorded_folder

__all__ = ["make", "model", "recorded", "recorded_folder"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These models are so small that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
