"""The command that measures the kit's own speed: semkit bench."""

from dataclasses import replace

from semkit.app.inputs import engine_of
from semkit.app.progress import progress
from semkit.app.telling import FINE, announce, print_json, tell
from semkit.nets.lab import Lab

GIVEN = "nets", "batch", "rounds", "samples", "attack_steps"


def bench(options) -> int:
    """semkit bench: the engine against plain PyTorch; reports the table."""
    from semkit.analysis.speed import QUICK, Plan, measure  # with it torch loads what counts operations
    from semkit.analysis.speedreport import markdown, write_bench

    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)  # fails before minutes of work, not after
    given = {name: value for name in GIVEN if (value := getattr(options, name)) is not None}
    plan = replace(QUICK if options.quick else Plan(), **given)
    with progress() as on_step:
        result = measure(plan, Lab(engine_of(options), on_step=on_step), announce)
    print_json(options, result)
    tell(options, markdown(result))
    if options.out:
        write_bench(result, options.out)
    return FINE
