"""`python -m lycore`."""

import sys

from .cli import main

sys.exit(main())
