"""Lets the tests of this folder import the reader of sampled arrays, which lies beside goldens."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "golden"))
