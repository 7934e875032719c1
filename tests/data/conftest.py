import pathlib
import sys

# The reader of sampled arrays is shared by several folders, and odd files by several tests of this.
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "golden"))
sys.path.insert(0, str(pathlib.Path(__file__).parent))
