"""The command that measures the kit's own speed: semkit bench."""

from semkit.app.inputs import engine_of
from semkit.app.progress import progress
from semkit.app.telling import FINE, announce, print_json, tell


def bench(options) -> int:
    """semkit bench: the engine against a plain reference; reports the table."""
    from semkit.analysis import (
        bench as timed,  # counting operations is imported with it: a moment the others need not pay
    )
    from semkit.analysis.benchreport import markdown, write_bench

    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)  # fails before minutes of work, not after
    with progress() as on_step:
        result = timed.bench(timed.planned(**vars(options)), engine_of(options), on_step=on_step, say=announce)
    print_json(options, result)
    tell(options, markdown(result))
    if options.out:
        write_bench(result, options.out)
    return FINE
