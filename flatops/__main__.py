"""`python -m flatops` is the command `flatops`."""

import sys

from flatops.cli import main

sys.exit(main())
