"""Folders with one subfolder of images for each class."""

from PIL import Image


def write_image(path, color=(200, 100, 50), size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def write_classes(folder, **counts):
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            write_image(folder / name / f"{number}.jpg", color=(20 * number, 100, 50))
    return folder
