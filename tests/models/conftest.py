import pathlib
import sys

# The trees of the reference files are shared by several test modules of this folder.
sys.path.insert(0, str(pathlib.Path(__file__).parent))
