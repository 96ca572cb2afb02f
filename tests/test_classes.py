"""The class that a name refers to."""

import pytest

from vitx import VitxError
from vitx.models.classes import find_class, known_class_names, read_class_names

NAMES = ("tabby, tabby cat", "crane", "tiger cat", "crane", "beagle", "7")


@pytest.mark.parametrize(
    ("target", "found"),
    [("tabby", 0), ("TABBY  cat", 0), ("tabby, tabby cat", 0), ("3", 3), (" 4 ", 4), ("7", 5), ("Beagle", 4)],
)
def test_found(target, found):
    assert find_class(target, len(NAMES), NAMES) == found


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("crane", "2 classes are called 'crane': name one by its number, 1 or 3"),
        ("beegle", r"there is no class 'beegle': did you mean 'beagle'\?"),
        ("cat", r"there is no class 'cat': did you mean .*'tabby'.*\?$"),
        ("6", "the model has classes 0 to 5"),
        ("-1", "there is no class -1: the model has classes 0 to 5"),
        ("zzz", "there is no class 'zzz': give its number"),
        ("", "there is no class ''"),
    ],
)
def test_refused(target, sentence):
    with pytest.raises(VitxError, match=sentence):
        find_class(target, len(NAMES), NAMES)


def test_without_names():
    assert find_class("3", 6, None) == 3
    with pytest.raises(VitxError, match="the class names are unknown"):
        find_class("tabby", 6, None)


def test_imagenet():
    names = known_class_names(1000)
    assert len(names) == 1000
    assert find_class("golden retriever", 1000, names) == 207


def test_file(tmp_path):
    (tmp_path / "names.txt").write_text("cat\n\n  dog \n", "utf-8")
    assert read_class_names(tmp_path / "names.txt") == ("cat", "dog")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "absent", tmp_path / "bytes", tmp_path):
        with pytest.raises(VitxError, match="the class names could not be read"):
            read_class_names(path)
