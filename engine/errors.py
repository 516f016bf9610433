"""A user's mistake, and how a command reports it: one message, exit status 2."""

import functools
import sys
from collections.abc import Callable

INTERRUPTED = 130  # exit status, as shells have it for Ctrl-C


class ConfigError(Exception):
    """A user's mistake: all problems at once, each with what, where, what is allowed and the nearest name."""

    def __init__(self, problems: list[str] | str, where: str = ""):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        self.where = where
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        head = f"{count} in {where}:" if where else f"{count}:"
        super().__init__("\n".join([head, *(f"  - {p}" for p in self.problems)]))


def command(main: Callable) -> Callable:
    """Decorate a command's `main`: a ConfigError becomes its message on stderr and exit status 2; Ctrl-C one word."""

    @functools.wraps(main)
    def run(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(2)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr, flush=True)
            sys.exit(INTERRUPTED)

    return run
