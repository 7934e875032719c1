import pathlib
import sys

# The reader of sampled arrays is shared by several folders.
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "golden"))
