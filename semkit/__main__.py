"""python -m semkit: the command line."""

import sys

from semkit.cli import main

sys.exit(main())
