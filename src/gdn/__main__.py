"""`python -m gdn` is `gdn`."""

import sys

from gdn.cli import main

if __name__ == "__main__":  # workers of `gdn prepare` import this module too
    sys.exit(main())
