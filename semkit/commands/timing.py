"""The command that measures the kit's own speed: semkit bench."""

from semkit.commands.inputs import engine_of
from semkit.commands.progress import progress
from semkit.commands.telling import FINE, announce, print_json, tell


def bench(options) -> int:
    """semkit bench: the engine against a plain reference; reports the table."""
    from semkit.speed.bench import planned  # counting operations is imported with it: a moment the others need not pay
    from semkit.speed.benchreport import markdown, run_bench

    with progress() as on_step:
        result = run_bench(planned(**vars(options)), engine_of(options), options.out, on_step=on_step, say=announce)
    print_json(options, result)
    tell(options, markdown(result))
    return FINE
