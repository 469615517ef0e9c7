"""``python -m accel_launch`` is `accel`, for where no scripts are on the path."""

from __future__ import annotations

import sys

from accel_launch.cli import main

sys.exit(main())
