"""``python -m steerfm`` is the command ``steerfm``."""

import sys

from steerfm.cli import main

sys.exit(main())
