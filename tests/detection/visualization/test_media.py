"""What a user may point at, and what comes out."""

from __future__ import annotations

import struct
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detection.errors import UserError
from detection.visualization.media import VideoWriter, read_source, write_picture

RED, BLUE = (200, 30, 30), (30, 30, 200)


def save(path: Path, color: tuple[int, int, int] = RED, size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def write_video(path: Path, size: tuple[int, int], fps: Fraction, num_frames: int = 5) -> Path:
    """The left half red, the right half blue, ever darker."""
    with VideoWriter(path, fps) as writer:
        for i in range(num_frames):
            pixels = np.zeros((size[1], size[0], 3), np.uint8)
            pixels[:, : size[0] // 2, 0] = 240 - 30 * i
            pixels[:, size[0] // 2 :, 2] = 240 - 30 * i
            writer.write(Image.fromarray(pixels))
    return path


def test_one_picture(tmp_path: Path) -> None:
    source = read_source(save(tmp_path / "a.PNG"))
    frames = list(source)
    assert [(f.name, f.image.mode, f.image.size) for f in frames] == [("a.PNG", "RGB", (40, 30))]
    assert (source.num_frames, source.fps, source.is_video) == (1, None, False)


def test_a_folder_is_read_in_order_with_what_it_lacks_counted(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg", "sub/c.webp", ".hidden/x.png"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("")
    whole = save(tmp_path / "sub" / "broken.jpg", size=(200, 200)).read_bytes()
    (tmp_path / "sub" / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    source = read_source(tmp_path)
    assert source.num_frames == 5
    assert source.num_ignored == 2
    for _ in range(2):
        assert [frame.name for frame in source] == ["a.jpg", "b.png", "sub/c.webp"]
        assert source.unreadable == ["empty.png", "sub/broken.jpg"]


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert next(iter(read_source(tmp_path / "turned.jpg"))).image.size == (30, 40)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), RED).convert(mode).save(tmp_path / "a.tiff")
    assert next(iter(read_source(tmp_path / "a.tiff"))).image.mode == "RGB"


def test_what_cannot_be_a_source_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match=r"missing\.png does not exist"):
        read_source(tmp_path / "missing.png")
    with pytest.raises(UserError, match="holds no pictures"):
        read_source(tmp_path)
    with pytest.raises(UserError, match=r"a\.txt is of an unknown type"):
        read_source(tmp_path / "a.txt")


def test_a_source_without_anything_readable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"a\.png cannot be read: it is not an image$"):
        list(read_source(tmp_path / "a.png"))
    with pytest.raises(UserError, match="none of the 1 pictures"):
        list(read_source(tmp_path))
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match=r"a\.mp4 cannot be read"):
        read_source(tmp_path / "a.mp4")


def test_outputs_do_not_collide_and_keep_their_folders(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.jpg.png", "a.png", "a.webp", "sub/a.jpg"):
        save(tmp_path / "in" / name)
    source = read_source(tmp_path / "in")
    out = tmp_path / "out"
    for suffix, expected in (
        (None, ["a.jpg", "a.jpg.png", "a.png", "a.webp.png", "sub/a.jpg"]),
        (".png", ["a.jpg.png.png", "a.jpg.png", "a.png", "a.webp.png", "sub/a.jpg.png"]),
    ):
        paths = [source.output_path(out, frame.name, suffix) for frame in source]
        assert [path.relative_to(out).as_posix() for path in paths] == expected


def test_sources_are_never_overwritten(tmp_path: Path) -> None:
    file = save(tmp_path / "a.png")
    for source in (read_source(tmp_path), read_source(file)):
        with pytest.raises(UserError, match="is a file of the source"):
            source.output_path(tmp_path, "a.png")
        assert source.output_path(tmp_path, "a.png", ".jpg") == tmp_path / "a.png.jpg"
    save(tmp_path / "sub" / "a.png")
    with pytest.raises(UserError, match="is a file of the source"):
        read_source(tmp_path).output_path(tmp_path / "sub", "a.png")


def test_drawn_pictures_inside_the_source_are_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("20240105/a.png", "20240105/out/a.png"):
        save(tmp_path / name)
    for path, output, names, num_ignored in (
        ("20240105", "20240105/out", ["a.png"], 1),
        (tmp_path / "20240105", "20240105/out", ["a.png"], 1),
        ("20240105", ".", ["a.png", "out/a.png"], 0),
        ("20240105", "20240105", ["a.png", "out/a.png"], 0),
    ):
        source = read_source(path, output=output)
        assert [frame.name for frame in source] == names
        assert source.num_ignored == num_ignored


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_pictures_are_written_with_folders(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / f"a{suffix}"
    write_picture(Image.new("RGB", (20, 10), RED), path)
    with Image.open(path) as image:
        assert image.size == (20, 10)
        assert np.allclose(np.asarray(image), RED, atol=4)
    with pytest.raises(UserError, match=r"\.png or \.jpg"):
        write_picture(Image.new("RGB", (20, 10)), tmp_path / "a.gif")


@pytest.mark.parametrize("fps", [Fraction(25), Fraction(30000, 1001)])
def test_video_round_trip(fps: Fraction, tmp_path: Path) -> None:
    source = read_source(write_video(tmp_path / "new" / "clip.mp4", (97, 65), fps))
    assert (source.fps, source.num_frames, source.is_video) == (fps, 5, True)
    frames = list(source)
    assert [frame.name for frame in frames] == [f"clip_{i:06d}" for i in range(5)]
    assert {frame.image.size for frame in frames} == {(98, 66)}
    for i, frame in enumerate(frames):
        pixels = np.asarray(frame.image).astype(int)
        assert np.allclose(pixels[30, 20], [240 - 30 * i, 0, 0], atol=20)
        assert np.allclose(pixels[30, 80], [0, 0, 240 - 30 * i], atol=20)
    assert source.output_path(tmp_path, frames[0].name) == tmp_path / "clip_000000.png"
    assert source.output_path(tmp_path, "clip.mp4", ".mp4") == tmp_path / "clip.mp4"
    with pytest.raises(UserError, match="is a file of the source"):
        source.output_path(tmp_path / "new", "clip.mp4", ".mp4")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["clip.mp4"]


def test_a_turned_video_is_read_upright(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", (96, 64), Fraction(25))
    content = path.read_bytes()
    track = content.index(b"tkhd")
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    clockwise = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    start = content.index(upright, track)
    path.write_bytes(content[:start] + clockwise + content[start + len(upright) :])
    image = next(iter(read_source(path))).image
    assert image.size == (64, 96)
    # Turned clockwise, the left half is on top.
    assert np.allclose(np.asarray(image).astype(int)[20, 32], [240, 0, 0], atol=20)


def test_a_video_that_breaks_off_gives_what_it_has_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    noise = np.random.default_rng(0).integers(0, 256, (20, 64, 96, 3), np.uint8)
    with VideoWriter(path, 25) as writer:
        for pixels in noise:
            writer.write(Image.fromarray(pixels))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4000] = bytes(4000)
    path.write_bytes(content)
    source = read_source(path)
    assert 0 < len(list(source)) < 20
    assert len(source.unreadable) == 1


def test_a_failed_or_empty_video_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail_after(num_pictures: int) -> None:
        with VideoWriter(tmp_path / "a.mp4", 25) as writer:
            for _ in range(num_pictures):
                writer.write(Image.new("RGB", (32, 32)))
            raise RuntimeError

    for num_pictures in (0, 1, 60):
        with pytest.raises(RuntimeError):
            fail_after(num_pictures)
        assert list(tmp_path.iterdir()) == []
    with VideoWriter(tmp_path / "a.mp4", 25):
        pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"\.mp4"):
        VideoWriter(tmp_path / "a.avi", 25)


def test_videos_without_pyav_name_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"")
    for make in (
        lambda: read_source(tmp_path / "a.mp4"),
        lambda: VideoWriter(tmp_path / "b.mp4", 5),
    ):
        with pytest.raises(UserError, match=r"pip install -e '\.\[video\]'"):
            make()


def write_stream(path: Path, size: tuple[int, int]) -> bytes:
    """Ten blue frames as MPEG-TS, which can be joined end to end."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w", format="mpegts") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for _ in range(10):
            frame = av.VideoFrame.from_image(Image.new("RGB", size, BLUE))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path.read_bytes()


def test_a_video_whose_frames_change_their_size(tmp_path: Path) -> None:
    path = tmp_path / "in.mpg"
    path.write_bytes(
        write_stream(tmp_path / "a", (96, 64)) + write_stream(tmp_path / "b", (64, 128))
    )
    frames = list(read_source(path))
    assert {frame.image.size for frame in frames} == {(96, 64), (64, 128)}
    with VideoWriter(tmp_path / "out.mp4", 10) as writer:
        for frame in frames:
            writer.write(frame.image)
    written = [frame.image for frame in read_source(tmp_path / "out.mp4")]
    assert len(written) == len(frames)
    assert {image.size for image in written} == {(96, 64)}
    # The tall frame fits in whole, with black beside it.
    pixels = np.asarray(written[-1]).astype(int)
    assert np.allclose(pixels[32, 48], BLUE, atol=20) and np.allclose(pixels[32, 8], 0, atol=20)


def test_a_camera(monkeypatch: pytest.MonkeyPatch) -> None:
    av = pytest.importorskip("av")
    opened = []

    def open_generated(name: str, *, format: str) -> object:
        opened.append((name, format))
        return real_open("testsrc=size=64x48:rate=10", format="lavfi")

    real_open = av.open
    monkeypatch.setattr(av, "open", open_generated)
    monkeypatch.setattr(sys, "platform", "linux")
    source = read_source(3)
    assert (source.camera, source.is_video, source.fps, source.num_frames) == (3, True, 10, None)
    assert source.output_path("out", source.path.name, ".mp4") == Path("out/camera_3.mp4")
    frames = iter(source)
    assert [next(frames).image.size for _ in range(3)] == [(64, 48)] * 3
    assert set(opened) == {("/dev/video3", "v4l2")}


def test_a_camera_that_is_not_there() -> None:
    with pytest.raises(UserError, match="camera 97 cannot be opened"):
        read_source("97")
