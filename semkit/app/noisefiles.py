"""The command that turns a noise file into one of another kind: semkit convert."""

from semkit.app.telling import FINE, print_json, tell
from semkit.images.files import shown
from semkit.protections.conversion import convert as convert_file


def convert(options) -> int:
    """semkit convert: the noise of SRC as DST, whose suffix says the kind; reports shape and radius."""
    how = dict(radius=options.radius, unit=options.unit, class_wise=options.class_wise, overwrite=options.overwrite)
    noise = convert_file(options.source, options.destination, **how)
    shape = list(noise.levels.shape)
    print_json(options, {"destination": options.destination, "shape": shape, "radius": noise.radius})
    tell(options, f"{shown(options.destination)}: {'x'.join(map(str, shape))}, radius {noise.radius:g}")
    return FINE
