"""What can be seen of a picture without looking at it."""

from PIL import Image


def assert_legible(path):
    with Image.open(path) as picture:
        assert picture.width > 800 and len(picture.convert("RGB").getcolors(1 << 20)) > 10
