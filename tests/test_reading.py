"""Image files of every kind, and files that are not images."""

import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitx import VitxError
from vitx.inputs import reading as pictures
from vitx.inputs.clips import VOLUMES
from vitx.inputs.reading import find_pictures, read_picture, to_rgb

LEFT = np.zeros((20, 30, 3), np.uint8)
LEFT[:, :10] = (200, 40, 10)  # a bar on the left


def saved(path, image, **options):
    image.save(path, **options)
    return path


def close(picture, wanted, tolerance):
    assert picture.mode == "RGB"
    difference = np.abs(np.asarray(picture, int) - np.asarray(wanted, int))
    return picture.size == (wanted.shape[1], wanted.shape[0]) and difference.max() <= tolerance


def test_whatever_pillow_raises_is_one_sentence(tmp_path, monkeypatch):
    Image.new("RGB", (9, 9)).save(tmp_path / "odd.png")
    monkeypatch.setattr(Image.Image, "load", lambda _: struct.unpack(">H", b""))
    with pytest.raises(VitxError, match=r"odd\.png could not be read, it may be damaged: unpack"):
        read_picture(tmp_path / "odd.png")


class TestRead:
    def test_png(self, tmp_path):
        assert close(read_picture(saved(tmp_path / "a.png", Image.fromarray(LEFT))), LEFT, 0)

    def test_cmyk(self, tmp_path):
        path = saved(tmp_path / "a.jpg", Image.fromarray(LEFT).convert("CMYK"), quality=95)
        assert close(read_picture(path), LEFT, 25)

    def test_sixteen_bits_become_eight(self, tmp_path):
        values = np.linspace(0, 65535, 20 * 30).reshape(20, 30).astype(np.uint16)
        path = saved(tmp_path / "a.png", Image.fromarray(values))
        wanted = np.repeat((values / 257)[..., None], 3, -1)
        assert close(read_picture(path), wanted, 1)
        path = saved(tmp_path / "a.tif", Image.fromarray(values))
        assert close(read_picture(path), wanted, 1)

    @pytest.mark.parametrize("mode", ["RGBA", "LA"])
    def test_transparent_is_white(self, tmp_path, mode):
        image = Image.new("RGBA", (30, 20), (10, 10, 10, 0))
        image.paste((10, 10, 10, 255), (0, 0, 10, 20))
        wanted = np.full((20, 30, 3), 255)
        wanted[:, :10] = 10
        assert close(read_picture(saved(tmp_path / "a.png", image.convert(mode))), wanted, 0)

    def test_a_transparent_palette(self, tmp_path):
        image = Image.fromarray(LEFT).quantize(4)
        corner = image.getpixel((29, 0))
        path = saved(tmp_path / "a.png", image, transparency=corner)
        wanted = LEFT.copy()
        wanted[:, 10:] = 255
        assert close(read_picture(path), wanted, 4)

    def test_of_an_animation_the_first_frame(self, tmp_path):
        frames = [Image.fromarray(LEFT), Image.new("RGB", (30, 20), "blue")]
        path = saved(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
        assert close(read_picture(path), LEFT, 4)

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_upright(self, tmp_path, orientation):
        """Images are turned upright from each of the eight orientations that EXIF defines."""
        stored = {
            1: LEFT,
            2: LEFT[:, ::-1],
            3: LEFT[::-1, ::-1],
            4: LEFT[::-1],
            5: LEFT.swapaxes(0, 1),
            6: np.rot90(LEFT, 1),
            7: np.rot90(LEFT, 2).swapaxes(0, 1),
            8: np.rot90(LEFT, -1),
        }[orientation]
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = saved(tmp_path / "a.png", Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
        assert close(read_picture(path), LEFT, 0)


class TestRefusals:
    def test_no_file(self, tmp_path):
        with pytest.raises(VitxError, match=r"there is no file .*absent\.jpg"):
            read_picture(tmp_path / "absent.jpg")

    def test_a_folder(self, tmp_path):
        with pytest.raises(VitxError, match="is no file"):
            read_picture(tmp_path)

    def test_text(self, tmp_path):
        (tmp_path / "a.jpg").write_text("no picture")
        with pytest.raises(VitxError, match=r"a\.jpg is not an image file that can be read"):
            read_picture(tmp_path / "a.jpg")

    @pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp"])
    def test_truncated(self, tmp_path, suffix):
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
        path = saved(tmp_path / f"a.{suffix}", Image.fromarray(noise))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(
            VitxError, match=rf"a\.{suffix} (could not be read, it may be damaged|is no image)"
        ):
            read_picture(path)

    def test_too_small(self, tmp_path):
        with pytest.raises(VitxError, match="1 x 1 pixels: at least 8 x 8"):
            read_picture(saved(tmp_path / "a.png", Image.new("RGB", (1, 1))))

    def test_too_large_unless_allowed(self, tmp_path, monkeypatch):
        path = saved(tmp_path / "a.png", Image.new("1", (20_000, 20_000)))
        with pytest.raises(VitxError, match=r"20000 x 20000 pixels, more than the 100,000,000"):
            read_picture(path)
        limit = Image.MAX_IMAGE_PIXELS
        monkeypatch.setattr(pictures, "to_rgb", lambda image, name: image.resize((10, 10)))
        assert read_picture(path, 20_000**2).size == (10, 10)
        assert limit == Image.MAX_IMAGE_PIXELS

    def test_floating_point(self, tmp_path):
        path = saved(tmp_path / "a.tif", Image.new("F", (20, 20), 0.5))
        with pytest.raises(VitxError, match=r"a\.tif has floating point numbers"):
            read_picture(path)


def test_to_rgb_leaves_its_image_alone():
    image = Image.new("RGBA", (20, 20), (1, 2, 3, 0))
    to_rgb(image)
    assert image.getpixel((0, 0)) == (1, 2, 3, 0)


class TestFind:
    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "deep").mkdir()
        for name in ("b.jpg", "a.PNG", "notes.txt", ".hidden.jpg", "deep/c d \N{SNOWMAN}.webp", "-dash.jpg"):
            (tmp_path / name).write_bytes(b"x")
        return tmp_path

    def names(self, found, folder):
        return [str(path.relative_to(folder)) for path in found]

    def test_in_a_folder_at_any_depth(self, folder):
        assert self.names(find_pictures([folder]), folder) == [
            "-dash.jpg",
            "a.PNG",
            "b.jpg",
            "deep/c d \N{SNOWMAN}.webp",
        ]

    def test_a_file_is_taken_as_it_is(self, folder):
        assert self.names(find_pictures([folder / "notes.txt"]), folder) == ["notes.txt"]

    def test_patterns(self, folder):
        assert self.names(find_pictures([f"{folder}/**/*.webp", f"{folder}/b*"]), folder) == [
            "deep/c d \N{SNOWMAN}.webp",
            "b.jpg",
        ]

    def test_nothing_twice(self, folder):
        assert len(find_pictures([folder, folder / "b.jpg", folder])) == 4

    def test_a_name_with_magic_characters(self, tmp_path):
        (tmp_path / "a[1].jpg").write_bytes(b"x")
        assert len(find_pictures([tmp_path / "a[1].jpg"])) == 1

    @pytest.mark.parametrize(
        ("given", "sentence"),
        [
            ("absent.jpg", "there is no file or folder .*absent.jpg"),
            ("*.jpg", r"nothing matches .*\*\.jpg$"),
            ("", "there are no image files in"),
            (None, "a path is empty"),
        ],
    )
    def test_nothing_there(self, tmp_path, given, sentence):
        with pytest.raises(VitxError, match=sentence):
            find_pictures(["" if given is None else f"{tmp_path}/{given}"])


def test_suffixes_of_two_parts_are_whole(tmp_path):
    for name in ("scan.nii.gz", "SCAN2.NII.GZ", "notes.tar.gz", "log.gz"):
        (tmp_path / name).touch()
    found = find_pictures([tmp_path], VOLUMES)
    assert sorted(path.name for path in found) == ["SCAN2.NII.GZ", "scan.nii.gz"]


def test_a_file_by_two_names_is_one(tmp_path, monkeypatch):
    saved(tmp_path / "a.png", Image.fromarray(LEFT))
    monkeypatch.chdir(tmp_path)
    assert find_pictures(["a.png", tmp_path / "a.png", f"../{tmp_path.name}/a.png"]) == [Path("a.png")]


def test_pillow_draws_text_while_a_file_is_opened(tmp_path, monkeypatch):
    """Pillow multiplies its limit whenever it draws text, also in another thread."""
    path, open_file, drawn = saved(tmp_path / "a.png", Image.fromarray(LEFT)), Image.open, []

    def opens(*args):
        drawn.append(Image.MAX_IMAGE_PIXELS)
        return open_file(*args)

    monkeypatch.setattr(Image, "open", opens)
    for limit in (100, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        read_picture(path)
        assert limit == Image.MAX_IMAGE_PIXELS
    assert drawn[0] > 20_000**2  # still a number
    assert drawn[1] is None


def test_threads_that_read_leave_pillows_limit_as_it_was(tmp_path, monkeypatch):
    """The limit that one thread restores does not apply to a file that another thread still opens."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    path = saved(tmp_path / "a.png", Image.fromarray(LEFT))
    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(read_picture, [path] * 100))) == 100
    assert Image.MAX_IMAGE_PIXELS == 100
