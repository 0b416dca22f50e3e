"""`python -m ledits_min` is `ledits`."""

import sys

from ledits_min.app.cli import main

sys.exit(main())
