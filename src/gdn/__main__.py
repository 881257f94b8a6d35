"""`python -m gdn` is `gdn`."""

import sys

from gdn.cli import main

sys.exit(main())
