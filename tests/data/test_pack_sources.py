import os
from pathlib import Path

import pytest

from orchestrate.data.pack_sources import Source, image_folder, listing, relabel
from orchestrate.errors import DataError


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"image")
    return folder


def listed(source: Source) -> list[tuple[str, str, str]]:
    return [(item.key, item.extension, item.class_name) for item in source.items]


def test_sub_folders_are_classes(tmp_path: Path) -> None:
    touch(
        tmp_path, "dog/b.PNG", "cat/deep/a.jpeg", "cat/notes.txt", ".cache/c.png", "cat/.hidden.png", "dog v1.2/d.jpg"
    )
    source = image_folder(tmp_path)
    assert source.classes == ("cat", "dog", "dog v1.2")
    assert listed(source) == [
        ("cat/deep/a", "jpg", "cat"),
        ("dog/b", "png", "dog"),
        ("dog v1.2/d", "jpg", "dog v1.2"),
    ]


def test_folder_without_sub_folders_is_unlabelled(tmp_path: Path) -> None:
    source = image_folder(touch(tmp_path, "b.png", "a.jpg"))
    assert source.classes == ()
    assert listed(source) == [("a", "jpg", ""), ("b", "png", "")]


def test_classes_that_are_numbers_are_sorted_by_value(tmp_path: Path) -> None:
    assert image_folder(touch(tmp_path, "10/a.png", "9/b.png", "0/c.png")).classes == ("0", "9", "10")


def test_identity_follows_names_classes_and_dates_but_not_the_place(tmp_path: Path) -> None:
    for place in ("here", "there"):
        touch(tmp_path / place, "cat/a.png", "dog/b.png")
        for path in (tmp_path / place).rglob("*.png"):
            os.utime(path, (0, 0))
    here, there = image_folder(tmp_path / "here"), image_folder(tmp_path / "there")
    assert here.identity == there.identity
    assert relabel(here, ["dog", "cat"]).identity != here.identity
    os.utime(tmp_path / "there/cat/a.png", (1, 1))
    assert image_folder(tmp_path / "there").identity != here.identity


def test_classes_of_another_split_number_the_labels(tmp_path: Path) -> None:
    source = image_folder(touch(tmp_path, "dog/a.png"))
    assert relabel(source, ["cat", "dog"]).classes == ("cat", "dog")
    with pytest.raises(DataError, match=r"dog: not among the 1 classes asked for \(cat\)"):
        relabel(source, ["cat"])
    with pytest.raises(DataError, match=r"dog: not among the 0 classes asked for \(none\)"):
        relabel(source, [])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "is empty"),
        (["a.txt", "cat/b.gif"], "none of its 2 files is an image by its suffix"),
        (["manifest.json", "x.tar"], "is a packed dataset already"),
        (["cat/a.png", "b.png"], "1 images beside the class folders, e.g. .*b.png"),
        (["train/cat/a.png", "val/cat/b.png"], "its folders are splits, not classes"),
        (["cat/a.png", "dog/readme.txt"], "dog: class folder without images"),
        (["cat/a.png", "cat/a.jpg"], "cat/a.png: same key `cat/a` as .*cat/a.jpg"),
        (["cat/a.v2.png"], "a.v2.png: a dot in the name"),
        (["cat/a\nb.png"], r"a\\nb.png': control character"),
        ([f"cat/{'x' * 120}.png"], "name too long for a tar"),
    ],
)
def test_folders_that_cannot_be_packed(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        image_folder(touch(tmp_path, *names))


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere", "a.png")
    touch(tmp_path / "images", "dog/b.png")
    (tmp_path / "images/cat").symlink_to(tmp_path / "elsewhere")
    assert image_folder(tmp_path / "images").classes == ("cat", "dog")
    (tmp_path / "images/dog/loop").symlink_to(tmp_path / "images")
    (tmp_path / "images/dog/c.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(DataError, match=r"2 problems[^$]*c.png: link to a missing file") as error:
        image_folder(tmp_path / "images")
    assert "the same folder was met before" in str(error.value)


def test_all_problems_are_counted_and_ten_shown(tmp_path: Path) -> None:
    touch(tmp_path, *(f"cat/{number}.x.png" for number in range(25)))
    with pytest.raises(DataError, match="25 problems; nothing was packed") as error:
        image_folder(tmp_path)
    assert str(error.value).count("a dot in the name") == 10
    assert str(error.value).endswith("and 15 more")


def test_names_that_are_not_utf8_do_not_break_the_message(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff.x.png")).write_bytes(b"")
    with pytest.raises(DataError) as error:
        image_folder(tmp_path)
    assert str(error.value).encode()


def write_listing(folder: Path, text: str, name: str = "list.csv") -> Path:
    touch(folder, "a.png", "sub/b.jpg", "c,d.png", "notes.txt")
    file = folder / name
    file.write_text(text)
    return file


def test_listing_with_labels(tmp_path: Path) -> None:
    file = write_listing(tmp_path, '\ufeffpath, label ,more\r\na.png,10,x\r\n\r\nsub/b.jpg, 9,x\r\n"c,d.png",9,x\r\n')
    source = listing(file)
    assert source.classes == ("9", "10")
    assert listed(source) == [("a", "png", "10"), ("sub/b", "jpg", "9"), ("c,d", "png", "9")]
    assert source.read(source.items[0]) == b"image"


def test_listing_with_tabs_and_without_labels(tmp_path: Path) -> None:
    source = listing(write_listing(tmp_path, "path\nc,d.png\n./sub//b.jpg\n", "list.tsv"))
    assert source.classes == ()
    assert listed(source) == [("c,d", "png", ""), ("sub/b", "jpg", "")]


def test_paths_outside_of_the_listing_get_a_key_that_stays_inside(tmp_path: Path) -> None:
    file = write_listing(tmp_path, "")
    (tmp_path / "lists").mkdir()
    file = tmp_path / "lists" / "list.csv"
    file.write_text(f"path\n../a.png\n{tmp_path}/sub/b.jpg\n")
    keys = [item.key for item in listing(file).items]
    assert keys == [str(tmp_path / "a").lstrip("/"), str(tmp_path / "sub/b").lstrip("/")]


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("", [r"list.csv:1: no column `path` in the header \(found: nothing\)"]),
        ("file,class\na.png,1\n", [r"list.csv:1: no column `path` in the header \(found: file, class\)"]),
        ("path,label\n", ["lists no images"]),
        ("path\na.png\ngone.png\nsub\nnotes.txt\n,\n", [
            "4 problems", "list.csv:3: gone.png: no such file", "list.csv:4: sub: not an image by its suffix",
            "list.csv:5: notes.txt: not an image by its suffix", "list.csv:6: 2 cells, the header has 1"]),
        ("path,label\na.png,1\nsub/b.jpg,\n", ["list.csv:3: sub/b.jpg: empty label"]),
        ("path,label\n,1\n", ["list.csv:2: empty path"]),
        ("path\na.png\n./a.png\n", ["list.csv:3: ./a.png: same key `a` as .*list.csv:2: a.png"]),
        ('path\na.png\n"sub/b.jpg\n', ["list.csv:[23]: cannot be read as UTF-8 text with separated values"]),
    ],
)  # fmt: skip
def test_listings_that_cannot_be_packed(tmp_path: Path, text: str, messages: list[str]) -> None:
    with pytest.raises(DataError) as error:
        listing(write_listing(tmp_path, text))
    for message in messages:
        assert error.match(message)


def test_listing_that_is_no_text(tmp_path: Path) -> None:
    file = write_listing(tmp_path, "")
    file.write_bytes(b"path\na\xff.png\n")
    with pytest.raises(DataError, match="cannot be read as UTF-8"):
        listing(file)
