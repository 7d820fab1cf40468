"""``python -m nemo_bench``: the command line."""

import sys

from nemo_bench.cli import main

sys.exit(main())
