"""``python -m newton_plugin_lightning``; see :mod:`newton_plugin_lightning.cli`."""

import sys

from newton_plugin_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
