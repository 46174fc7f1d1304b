"""``python -m nsds_gguf``: the same as the installed command ``nsds-gguf``."""

import sys

from .cli import main

sys.exit(main())
