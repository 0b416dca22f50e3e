import sys

from ledits_min.app.cli import main

sys.exit(main())
