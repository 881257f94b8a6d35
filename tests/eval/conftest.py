"""Fixtures of the evaluation tests: one thread for such small models, and the harness without its bars and notes."""

import logging
import os
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("TQDM_DISABLE", "1")  # read when lm_eval imports tqdm
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    yield
    torch.set_num_threads(threads)
