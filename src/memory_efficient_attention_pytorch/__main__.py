"""`python -m memory_efficient_attention_pytorch` is the command `mea`."""

import sys

from .cli import main

sys.exit(main())
