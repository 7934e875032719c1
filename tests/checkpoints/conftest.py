import pathlib
import sys

# What several test modules of this folder share.
sys.path.insert(0, str(pathlib.Path(__file__).parent))
