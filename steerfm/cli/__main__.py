"""``python -m steerfm.cli`` runs the command ``steerfm``."""

import sys

from steerfm.cli import main

sys.exit(main())
