"""`python -m difuse` is `difuse`."""
import sys

from difuse.cli import main

sys.exit(main())
