"""Run the command line with `python -m fastplastic`."""

import sys

from fastplastic.cli.main import main

sys.exit(main())
