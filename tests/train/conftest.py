"""Shards of a little generated text, made once, and one thread: the models are so small that a second only waits."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from train_testing import make_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards") / "data")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
