import pathlib
import sys

# Several test modules of this folder share the trees of the reference files.
sys.path.insert(0, str(pathlib.Path(__file__).parent))
