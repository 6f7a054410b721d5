"""``python -m nest_fn.train``: the same as ``nest-fn``, for torchrun."""

import sys

from nest_fn.train.cli import main

sys.exit(main())
