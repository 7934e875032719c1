import pathlib
import sys

# The trees of the reference files are shared by several test modules of this folder, and the
# reader of sampled arrays by several folders.
HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "golden")]
