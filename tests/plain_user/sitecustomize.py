"""Hides PyTorch from the processes that tests start: users need none, and it loads slowly."""

import sys

sys.modules["torch"] = None
