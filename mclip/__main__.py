"""``python -m mclip``."""

import sys

from mclip.cli.main import main

if __name__ == "__main__":  # not in the processes that execute notebooks
    sys.exit(main())
