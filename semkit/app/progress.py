"""The command line's bars, and what Ctrl-C does to a run."""

import signal
import sys
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress():
    """An on_step(what, step, total, metrics) that draws a bar per job and returns True after Ctrl-C.

    The first Ctrl-C, or SIGTERM, lets the step finish, so that the saved state is whole; the second one ends at once.
    Bars are drawn on a terminal only.
    """
    bars, stop = {}, []

    def interrupt(*_):
        if stop:
            raise KeyboardInterrupt
        stop.append(True)

    def close():
        for bar in bars.values():
            bar.close()
        bars.clear()

    def on_step(what, step, total, metrics):
        if what not in bars:
            close()
            bars[what] = tqdm(total=total, desc=what, file=sys.stderr, leave=False, disable=None)
        bar = bars[what]
        numbers = {k: f"{v:.3f}" for k, v in metrics.items() if isinstance(v, float)}
        numbers |= {k: f"{v:,}" for k, v in metrics.items() if k == "passes"}
        if numbers:
            bar.set_postfix(numbers, refresh=False)
        bar.update(step - bar.n)
        return bool(stop)

    before = {which: signal.signal(which, interrupt) for which in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield on_step
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
        close()
