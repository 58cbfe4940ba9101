"""Work in a background thread: one worker per name, and a new job of a name stops the old one."""

import threading
from collections.abc import Callable

from semkit.nets.lab import Interrupted

_lock = threading.RLock()
_jobs: dict[str, "Job"] = {}  # the current one of every name


class Job:
    """A worker thread, one per name: a new Job of the same name stops the old one's worker and starts after it.

    running: whether the worker is at work. result, error: what it returned or raised, else None.
    """

    def __init__(self, name: str):
        self.name, self.running, self.error, self.result = name, False, None, None
        self._thread, self._before, self._cancel = None, None, threading.Event()
        self._succeed()

    def _succeed(self) -> None:
        """Make this the current job of its name and ask the one before to stop."""
        with _lock:
            before = _jobs.get(self.name)
            _jobs[self.name] = self
            if before not in (None, self):
                before.cancel()
                self._before = before._thread

    def start(self, work: Callable, begin: Callable = lambda: None, end: Callable = lambda: None) -> bool:
        """Call begin(), then run work(cancelled) and end() in a thread; False, and nothing is done, if one is running.

        cancelled() is True once the work should stop; it stops by returning or by raising Interrupted.
        """
        with _lock:
            if self.running:
                return False
            self._succeed()
            self._cancel.clear()
            self.running, self.error, self.result = True, None, None
            begin()
            how = dict(name=f"semkit {self.name}", daemon=True)
            self._thread = threading.Thread(target=self._main, args=(work, end), **how)
            self._thread.start()
            return True

    def _main(self, work: Callable, end: Callable) -> None:
        try:
            if self._before:
                self._before.join()
            self.result = work(self._cancel.is_set)
        except Interrupted:
            pass  # stopped as asked: neither error nor result
        except BaseException as error:
            self.error = error
        with _lock:
            self.running = False
            end()

    def cancel(self) -> None:
        """Ask the worker to stop at its next step, without waiting for it."""
        self._cancel.set()

    def wait(self, timeout: float | None = None):
        """Wait for the worker and return its result; None if it was stopped or never started.

        Raises the worker's own error, and TimeoutError after `timeout` seconds. Ctrl-C stops the worker too.
        """
        if self._thread:
            try:
                self._thread.join(timeout)
            except KeyboardInterrupt:
                self.cancel()
                raise
            if self._thread.is_alive():
                raise TimeoutError(f"still running after {timeout:g} s")
        if self.error:
            raise self.error
        return self.result
