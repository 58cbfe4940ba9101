"""The command `semkit`, also as python -m semkit."""

import os
import signal
import sys


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0: fine, 1: a check failed, 2: bad input, 130: stopped by Ctrl-C or SIGTERM.

    What stops it or fails while torch is imported is one line too.
    """
    words, commands = sys.argv[1:] if arguments is None else arguments, {}
    # No KeyboardInterrupt: inside a half-imported library it may come out as any other error.
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(_end("stopped", 130)))
    try:
        from semkit.app.cli import run

        if any(not word.startswith("-") for word in words):  # a command, which needs torch
            from semkit.app.commands import COMMANDS as commands
    except (ImportError, OSError, MemoryError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return _end(f"cannot be started; install it anew, or give it more memory: {reason}", 2)
    finally:
        signal.signal(signal.SIGINT, before)
    return run(words, commands)


def _end(line: str, code: int) -> int:
    if sys.stderr is not None:
        print("semkit:", line, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
