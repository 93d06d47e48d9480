"""`python -m heterolora.cli`, the same as `heterolora`."""

import sys

from heterolora.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
