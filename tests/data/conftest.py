import pathlib
import sys

# Several tests of this folder share odd files.
sys.path.insert(0, str(pathlib.Path(__file__).parent))
