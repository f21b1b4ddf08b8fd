"""`python -m hovle_jax.cli`, where the console script is not on the path."""

import sys

from hovle_jax.cli.main import main

sys.exit(main())
