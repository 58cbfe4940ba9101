"""The command that opens the notebooks: semkit lab."""

import os
from pathlib import Path

from semkit.app.telling import FINE
from semkit.images.files import shown


def lab(options) -> int:
    """semkit lab: JupyterLab at a notebook, in this folder or in the notebook's own."""
    from jupyterlab.labapp import LabApp  # takes a second that the other commands need not pay

    notebook = Path(options.notebook)
    if not notebook.exists():
        raise ValueError(f"no notebook {shown(notebook)}; run semkit lab in semkit's own folder, or name a notebook")
    _check_account()
    notebook = notebook.resolve()
    here = Path.cwd() if notebook.is_relative_to(Path.cwd()) else notebook.parent
    LabApp.launch_instance([str(notebook), f"--ServerApp.root_dir={here}"])
    return FINE


def _check_account() -> None:
    """Raises ValueError for root, whom Jupyter refuses with a page of log, unless Jupyter's configuration allows it."""
    from jupyter_server.serverapp import ServerApp

    if hasattr(os, "geteuid") and os.geteuid() == 0:
        settings = ServerApp()
        settings.load_config_file()
        if not settings.allow_root:
            raise ValueError(
                "JupyterLab does not run as root: use another account, or start it by jupyter lab --allow-root"
            )
