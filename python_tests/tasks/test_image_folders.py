"""Folders of images: read class by class, photographs turned upright, and what is refused."""

import numpy as np
import pytest
import torch
from empty_folders import empty_folder
from PIL import ExifTags, Image

from petl_ext.tasks import image_classification as ic
from petl_ext.tasks.inputs import read_image


def test_a_folder_is_read_class_by_class(tmp_path):
    files = ("tree_frog/b.JPG", "tree_frog/more/a.png", "tree_frog/notes.txt", "cat/c.webp", ".cache/d.jpg", "e.jpg")
    hidden = ("cat/.c.webp", "cat/._c.webp", "tree_frog/more/.ipynb_checkpoints/a-checkpoint.png")
    images = ic.read_image_folder(empty_folder(tmp_path, *files, *hidden))
    assert [(str(image.path.relative_to(tmp_path)), image.class_name) for image in images] == [
        ("cat/c.webp", "cat"),
        ("tree_frog/b.JPG", "tree_frog"),
        ("tree_frog/more/a.png", "tree_frog"),
    ]


def test_links_are_followed_but_not_in_circles(tmp_path):
    empty_folder(tmp_path, "photos/cat/a.png", "elsewhere/b.png")
    link = tmp_path / "photos" / "cat" / "more"
    link.symlink_to(tmp_path / "elsewhere")
    assert [image.path.name for image in ic.read_image_folder(tmp_path / "photos")] == ["a.png", "b.png"]
    link.unlink()
    link.symlink_to(tmp_path / "photos" / "cat")
    with pytest.raises(ValueError, match=r"cat/more must be a folder of images, got a link to a folder that it"):
        ic.read_image_folder(tmp_path / "photos")


# The orientation of EXIF, and how the upright picture was turned before it was written.
TURNED = {1: None, 3: "ROTATE_180", 6: "ROTATE_90", 8: "ROTATE_270", 2: "FLIP_LEFT_RIGHT", 5: "TRANSPOSE"}


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize(("orientation", "turn"), TURNED.items())
def test_every_reader_turns_photographs_upright(orientation, turn, suffix, tmp_path):
    upright = Image.new("RGB", (40, 24))
    upright.paste((255, 255, 255), (0, 0, 40, 12))
    upright.paste((200, 0, 0), (0, 0, 10, 12))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    lying = upright if turn is None else upright.transpose(Image.Transpose[turn])
    lying.save(tmp_path / f"photo{suffix}", exif=exif, quality=95)
    found = read_image(tmp_path / f"photo{suffix}", "here")
    assert found.size == (40, 24)
    difference = torch.from_numpy(np.array(found)).float() - torch.from_numpy(np.array(upright)).float()
    assert difference.abs().mean() < 5


def test_a_folder_without_classes_or_images_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere must be a folder of one folder per class"):
        ic.read_image_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="must hold one folder per class, got none"):
        ic.read_image_folder(empty_folder(tmp_path, "a.jpg"))
    with pytest.raises(ValueError, match=r"dog must hold images of the class .*, got none"):
        ic.read_image_folder(empty_folder(tmp_path, "cat/a.jpg", "dog/a.txt"))
