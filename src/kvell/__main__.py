"""`python -m kvell`."""

import sys

from kvell.cli import main

sys.exit(main())
