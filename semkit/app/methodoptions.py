"""Which options of `protect` go with noise and which with filters, and where the private key comes from."""

import os

KEY_VARIABLE = "SEMKIT_KEY"
KEY_HELP = (
    "private key of --method cuda, 8 characters or more. Typed here it stays in the shell's history and is seen in the "
    f"list of processes: better put it into the environment variable {KEY_VARIABLE}"
)
# Options that belong to one kind of method, and their defaults.
OF_NOISE = {"radius": 8, "perturbation_radius": 4, "surrogate": None, "class_wise": False}
OF_FILTERS = {"key": None, "kernel": 3, "strength": 0.3}


def settle(options):
    """The options of `protect` with the defaults of its method, and the key from the environment if none was typed.

    Raises ValueError for an option of the other kind of method, and for cuda without a key.
    """
    filters = options.method == "cuda"
    wrong = [name for name in (OF_NOISE if filters else OF_FILTERS) if getattr(options, name) not in (None, False)]
    if wrong:
        given = ", ".join("--" + name.replace("_", "-") for name in wrong)
        raise ValueError(f"{given}: not for --method {options.method}" + " (no radius bounds a convolution)" * filters)
    for name, value in (OF_FILTERS if filters else OF_NOISE).items():
        setattr(options, name, value if getattr(options, name) is None else getattr(options, name))
    if filters and options.key is None:
        if (key := os.environ.get(KEY_VARIABLE)) is None:
            raise ValueError(f"--method cuda needs a private key: put it into the environment variable {KEY_VARIABLE}")
        options.key = key
    return options
