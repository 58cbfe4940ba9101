"""Work in a thread of its own: one worker under a name, stopped by whoever takes the name next."""

import threading
from collections.abc import Callable

from semkit.nets.lab import Interrupted

_lock = threading.RLock()
_jobs: dict[str, "Job"] = {}  # the live one of every name


class Job:
    """One worker thread at a time under a name: a new Job of that name stops the worker of the one before."""

    def __init__(self, name: str):
        self.name, self.running, self.error, self.result = name, False, None, None
        self._thread, self._before, self._cancel = None, None, threading.Event()
        self._succeed()

    def _succeed(self) -> None:
        """Makes this the live Job of its name; the one before is told to stop."""
        with _lock:
            before = _jobs.get(self.name)
            _jobs[self.name] = self
            if before not in (None, self):
                before.cancel()
                self._before = before._thread

    def start(self, work: Callable, begin: Callable = lambda: None, end: Callable = lambda: None) -> bool:
        """Whether work(cancelled) was started in a thread, between begin() and end(); False if one is running."""
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
            pass  # as asked: neither an error nor a result
        except BaseException as error:
            self.error = error
        with _lock:
            self.running = False
            end()

    def cancel(self) -> None:
        """Asks the worker to stop at its next step; does not wait for it."""
        self._cancel.set()

    def wait(self, timeout: float | None = None):
        """What the last work returned, once it is over; None if it was stopped or there was none.

        Raises its error, and TimeoutError if it takes longer than `timeout` seconds. Ctrl-C stops the worker too.
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
