"""Imported by the process that evaluation's workers are copies of: what they all need, and what RULER's tasks do."""

import importlib
from contextlib import suppress

for _name in ("gdn.evaluate", "nltk", "wonderwords"):
    with suppress(Exception):  # who needs it will import it, and tell
        importlib.import_module(_name)
