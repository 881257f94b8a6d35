"""Prepares a folder in a process of its own, to be killed: `prepare_driver.py SOURCE TOKENIZER OUT TASK_BYTES WORKERS`.

With PREPARE_DRIVER_HANGS set no task ever ends.
"""

import os
import sys
import time
from pathlib import Path

import gdn.data.executors
from gdn.data.prepare import Options, prepare
from gdn.data.sources import Source
from gdn.data.tokenizer import load_tokenizer

if "PREPARE_DRIVER_HANGS" in os.environ:
    gdn.data.executors.text_digest = lambda text: time.sleep(1000)

if __name__ == "__main__":  # the workers import this file too
    source, tokenizer, out, task_bytes, workers = sys.argv[1:]
    options = Options(task_bytes=int(task_bytes), workers=int(workers), deduplicate=True, holdout=0.05)
    prepare([Source(source)], load_tokenizer(Path(tokenizer)), Path(out), options)
