"""``python -m nest_fn.train``: the same as ``nest-fn``, for torchrun."""

import sys

from .cli.main import main

sys.exit(main())
