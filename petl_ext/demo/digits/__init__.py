"""The demo's task: small real data in the file formats of all tasks and of image folders, and models for them.

All of it is drawn from scikit-learn's 1797 handwritten digits; nothing is downloaded.
"""

from pathlib import Path

BACKBONE = Path(__file__).parent / "backbone"  # pre-trained by pretrain_vilt.py
