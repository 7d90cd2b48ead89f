"""``python -m stp_fx`` is the command ``stp-fx``."""

import sys

from stp_fx.cli import main

if __name__ == "__main__":
    sys.exit(main())
