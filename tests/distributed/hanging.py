"""engine.train whose rank 1 hangs for ever: hanging.py exchange|watched FILE.toml

exchange: in the process group, before the all-reduce; watched: after the meeting, before it joins.
"""

import contextlib
import os
import sys
import threading

from engine import train


def hang(*_, **__):
    threading.Event().wait()


@contextlib.contextmanager
def hang_at_once(*_):
    hang()
    yield


if __name__ == "__main__":
    where = sys.argv.pop(1)
    if os.environ["RANK"] == "1":
        from engine.config import load
        from engine.launch import tokens_for
        from engine.preflight import Preflight
        from engine.trainer import run

        setattr(Preflight, where, hang if where == "exchange" else hang_at_once)
        config = load(sys.argv[1])
        run(config, tokens_for(config))
    else:
        train.main()
