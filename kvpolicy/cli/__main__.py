"""``python -m kvpolicy.cli``: the program without its installed script."""

import sys

from kvpolicy.cli import main

if __name__ == "__main__":
    sys.exit(main())
