"""A trained net as a file: safetensors of its weights, with the name, classes and image size that it was built for."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import nn

from semkit.images.files import atomic_write, one_line, shown
from semkit.nets import models
from semkit.nets.engine import Engine

RECORD = ("net", "classes", "size")


def save_net(model: nn.Module, path: str | Path, *, net: str, classes: Sequence[str], size: int) -> None:
    """The weights of models.build(net, len(classes), size=size) in a file that load_net reads."""
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    record = json.dumps({"net": net, "classes": list(classes), "size": size})
    atomic_write(path, safetensors.torch.save(weights, {"semkit": record}))


def check_net(path: str | Path) -> str:
    """The path of a net's file as text; raises ValueError in one line where there is none."""
    if not Path(path).is_file():
        raise ValueError(f"{shown(path)}: no such net; semkit learn IMAGES --save {shown(path)} makes one")
    return str(path)


def digest(path: str | Path) -> str:
    """A name for the file's content: the first 16 hex digits of its sha256. Raises ValueError where there is none."""
    return hashlib.sha256(Path(check_net(path)).read_bytes()).hexdigest()[:16]


def load_net(path: str | Path, engine: Engine) -> nn.Module:
    """The net in a file of save_net, in eval mode and frozen; raises ValueError that says what is wrong with it."""
    check_net(path)
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {}).get("semkit", "{}"))
        net, classes, size = (record[name] for name in RECORD)
        model = models.build(net, len(classes), size=size).to(engine.dtype)
        model.load_state_dict(weights := safetensors.torch.load_file(path))
        if not all(values.isfinite().all() for values in weights.values()):
            raise ValueError("it has weights that are no finite numbers; train it anew")
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f"{shown(path)} is no net that semkit can read: {one_line(error)}") from error
    return engine.prepare(model).eval().requires_grad_(False)
