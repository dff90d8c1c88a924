"""The demo's task: small real data in the file formats of all tasks and of image folders, and models for them.

All of it is drawn from scikit-learn's 1797 handwritten digits; nothing is downloaded.
"""

from pathlib import Path

BACKBONE = Path(__file__).parent / "backbone"  # pre-trained by pretrain_vilt.py
RECIPES_BACKBONE = Path(__file__).parent / "backbone_of_recipes"  # the same, gone on with by pretrain_statements.py
CLIP_BACKBONE = Path(__file__).parent / "backbone_of_images"  # pre-trained by pretrain_clip.py
