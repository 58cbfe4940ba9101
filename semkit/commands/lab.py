"""The command that opens the notebooks: semkit lab."""

from pathlib import Path

from semkit.commands.telling import FINE
from semkit.files import shown


def lab(options) -> int:
    """semkit lab: JupyterLab at a notebook, in this folder or in the notebook's own."""
    from jupyterlab.labapp import LabApp  # takes a second that the other commands need not pay

    notebook = Path(options.notebook)
    if not notebook.exists():
        raise ValueError(f"no notebook {shown(notebook)}; run semkit lab in semkit's own folder, or name a notebook")
    notebook = notebook.resolve()
    here = Path.cwd() if notebook.is_relative_to(Path.cwd()) else notebook.parent
    LabApp.launch_instance([str(notebook), f"--ServerApp.root_dir={here}"])
    return FINE
