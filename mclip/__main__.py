"""``python -m mclip``."""

import sys

from .cli import main

sys.exit(main())
