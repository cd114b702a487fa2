"""From what happens to an exit code: a person's mistake is one sentence, never a traceback."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable

from envs.errors import UserError

PERSONS = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
    errno.ENAMETOOLONG,
)  # fmt: skip


_interrupted = False


def interruptible() -> None:
    """From here on `kill` ends the work as Ctrl-C does: by KeyboardInterrupt, so that it ends in good order.

    So does Ctrl-C itself where a shell had it ignored, as for background jobs. To be called once everything is
    imported: packages that are interrupted while they load raise anything, or crash.
    """
    if threading.current_thread() is threading.main_thread():
        for sign in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sign, _interrupt)


def guarded(work: Callable[[], object]) -> int:
    """Runs `work`; a mistake that a person can repair becomes one sentence on standard error and exit code 2."""
    try:
        work()
        sys.stdout.flush()
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:  # who reads, `head` for one, has seen enough: as the shell counts it, and no traceback
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        raise
    except UserError as problem:
        return _say(str(problem))
    except OSError as problem:
        if problem.errno not in PERSONS:
            raise
        if problem.errno in (errno.ENOSPC, errno.EDQUOT):
            return _say(
                "The disk is full: free some space, then go on with python main.py resume run=..., or, of ppo and "
                "atari100k, with the same command."
            )
        return _say(f"Cannot write {problem.filename}: {problem.strerror}.")
    except ArithmeticError as problem:
        from agent.trainer import NonFiniteLoss

        if not isinstance(problem, NonFiniteLoss):
            raise
        return _say(str(problem), code=1)
    except KeyboardInterrupt:
        return 130
    except SystemExit as leaving:  # Hydra's way to end after --version and the like, and ours out of a sweep
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except Exception:
        if _interrupted:  # what was interrupted, an import for one, may have made another error of it
            return 130
        raise
    return 0


def _interrupt(sign: int, frame: object) -> None:
    global _interrupted
    _interrupted = True
    raise KeyboardInterrupt


def _say(sentence: str, code: int = 2) -> int:
    print(" ".join(sentence.split()), file=sys.stderr)
    return code
