"""`gdn train` under torchrun, of whose processes the last is killed in two steps: `lost_rank.py STEP STEP ARGUMENTS`.

Only the first start kills in the first step, the second start in the second.
"""

import os
import signal
import sys

import gdn.cli
import gdn.train.loop

learning_rate = gdn.train.loop.learning_rate
starts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])


def deadly(step: int, *rest):  # type: ignore[no-untyped-def]
    if starts < 2 and step == int(sys.argv[1 + starts]) and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return learning_rate(step, *rest)


gdn.train.loop.learning_rate = deadly
sys.exit(gdn.cli.main(sys.argv[3:]))
