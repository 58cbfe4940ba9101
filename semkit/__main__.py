"""The command `semkit`, also as python -m semkit: one line where it is stopped or fails before torch is imported."""

import os
import signal
import sys


def main() -> int:
    """app.cli.main; one line and the exit code 130 or 2 where it is stopped or fails while it is imported."""
    # No KeyboardInterrupt: inside a half-imported library it may come out as any other error.
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(_end("stopped", 130)))
    try:
        from semkit.app.cli import main as run

        if any(not word.startswith("-") for word in sys.argv[1:]):  # a command, which needs torch
            import semkit.app.commands  # noqa: F401
    except (ImportError, OSError, MemoryError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return _end(f"cannot be started; install it anew, or give it more memory: {reason}", 2)
    finally:
        signal.signal(signal.SIGINT, before)
    return run()


def _end(line: str, code: int) -> int:
    if sys.stderr is not None:
        print("semkit:", line, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
