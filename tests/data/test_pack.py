import gzip
import hashlib
import io
import os
import shutil
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from orchestrate.data.index import Manifest, load_manifest
from orchestrate.data.pack import pack
from orchestrate.errors import DataError
from tests.datasets import draw_shapes, make_shapes


@pytest.fixture
def images(tmp_path: Path) -> Path:
    draw_shapes(tmp_path / "images", 23, size=12)
    return tmp_path / "images"


def files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def pack_tens(source: Path, dest: Path, **options: object) -> Manifest:
    return pack(str(source), str(dest), **({"samples_per_shard": 10, "workers": 1} | options))


def stock_samples(folder: Path) -> list[dict[str, bytes]]:
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    return list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))


def test_stock_webdataset_reads_what_is_packed(images: Path, tmp_path: Path) -> None:
    manifest = pack_tens(images, tmp_path / "packed")
    assert [shard.samples for shard in manifest.shards] == [10, 10, 3]
    assert manifest.classes == ("cross", "disc", "square", "triangle")
    samples = stock_samples(tmp_path / "packed")
    assert len(samples) == 23
    for sample in samples:
        original = images / f"{sample['__key__']}.png"
        assert sample["png"] == original.read_bytes()
        assert manifest.classes[int(sample["cls"])] == original.parent.name
    assert load_manifest(str(tmp_path / "packed")) == manifest


def test_bytes_depend_on_the_images_alone(images: Path, tmp_path: Path) -> None:
    first = pack_tens(images, tmp_path / "first")
    pack_tens(images, tmp_path / "again")
    pack_tens(images, tmp_path / "two", workers=2)
    pack_tens(images, tmp_path / "eight", workers=8)
    for path in images.rglob("*.png"):
        os.utime(path)  # dates name the pack in the manifest, never the contents
    later = pack_tens(images, tmp_path / "later")
    assert (
        files(tmp_path / "first") == files(tmp_path / "again") == files(tmp_path / "two") == files(tmp_path / "eight")
    )
    assert later.shards == first.shards
    assert later.digest == first.digest


def test_shuffling_is_seeded_and_can_be_left_out(images: Path, tmp_path: Path) -> None:
    keys = {}
    for seed in (0, 1, None):
        pack_tens(images, tmp_path / str(seed), shuffle_seed=seed)
        keys[seed] = [sample["__key__"] for sample in stock_samples(tmp_path / str(seed))]
    assert keys[None] == sorted(keys[None])
    assert sorted(keys[0]) == sorted(keys[1]) == keys[None]
    assert len({tuple(order) for order in keys.values()}) == 3


def test_limit_takes_the_first_of_the_shuffled(images: Path, tmp_path: Path) -> None:
    pack_tens(images, tmp_path / "all")
    manifest = pack_tens(images, tmp_path / "some", limit=12)
    assert manifest.num_samples == 12
    assert manifest.num_classes == 4
    assert stock_samples(tmp_path / "some")[11]["__key__"] == stock_samples(tmp_path / "all")[11]["__key__"]
    assert pack_tens(images, tmp_path / "more", limit=1000).num_samples == 23


def test_packing_again_does_nothing(images: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    manifest = pack_tens(images, tmp_path / "packed", progress=lambda done, total: calls.append((done, total)))
    assert calls[0] == (0, 23)
    assert calls[-1] == (23, 23)
    dates = {path: path.stat().st_mtime_ns for path in (tmp_path / "packed").iterdir()}
    again = pack_tens(images, tmp_path / "packed", workers=2, progress=lambda done, total: pytest.fail("packed again"))
    assert again == manifest
    assert dates == {path: path.stat().st_mtime_ns for path in (tmp_path / "packed").iterdir()}


def test_another_pack_is_kept_unless_overwritten(images: Path, tmp_path: Path) -> None:
    pack_tens(images, tmp_path / "packed")
    before = files(tmp_path / "packed")
    with pytest.raises(DataError, match=r"holds another dataset \(23 samples, split train, .*--overwrite"):
        pack_tens(images, tmp_path / "packed", limit=5)
    assert files(tmp_path / "packed") == before
    pack_tens(images, tmp_path / "packed", limit=5, overwrite=True)
    assert sorted(files(tmp_path / "packed")) == ["manifest.json", "train-000000.tar", "train-000000.tar.idx"]
    (tmp_path / "packed" / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        pack_tens(images, tmp_path / "packed")
    pack_tens(images, tmp_path / "packed", overwrite=True)
    assert files(tmp_path / "packed") == before


def test_interrupted_pack_goes_on_where_it_stopped(images: Path, tmp_path: Path) -> None:
    dest = tmp_path / "packed"
    pack_tens(images, tmp_path / "whole")

    def interrupt(done: int, total: int) -> None:
        if (dest / "train-000001.tar").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_tens(images, dest, progress=interrupt)
    with pytest.raises(DataError, match="no manifest"):
        load_manifest(str(dest))
    (dest / "train-000000.tar").write_bytes(b"damaged since")
    kept = (dest / "train-000001.tar").stat().st_ino
    pack_tens(images, dest)
    assert (dest / "train-000001.tar").stat().st_ino == kept
    assert files(dest) == files(tmp_path / "whole")


def test_unfinished_pack_of_other_images_is_not_taken_up(images: Path, tmp_path: Path) -> None:
    dest = tmp_path / "packed"
    pack_tens(images, tmp_path / "whole", shuffle_seed=1)
    pack_tens(images, dest)
    (dest / "manifest.json").unlink()
    (dest / "unfinished-pack.txt").write_text("another recipe")
    pack_tens(images, dest, shuffle_seed=1)
    assert files(dest) == files(tmp_path / "whole")


def test_damaged_pack_is_repaired_by_packing_again(images: Path, tmp_path: Path) -> None:
    pack_tens(images, tmp_path / "packed")
    before = files(tmp_path / "packed")
    (tmp_path / "packed/train-000001.tar").write_bytes(b"")
    (tmp_path / "packed/train-000002.tar.idx").unlink()
    pack_tens(images, tmp_path / "packed")
    assert files(tmp_path / "packed") == before


def damage(images: Path) -> None:
    names = sorted(images.rglob("*.png"))
    names[0].write_bytes(b"")
    names[1].write_bytes(names[1].read_bytes()[:-40])
    names[2].write_bytes(b"text")


@pytest.mark.parametrize("workers", [1, 2])
def test_images_that_cannot_be_decoded_are_listed_and_nothing_is_left(
    images: Path, tmp_path: Path, workers: int
) -> None:
    damage(images)
    with pytest.raises(DataError, match=r"images that cannot be packed .*--skip-bad.*: 3 problems") as error:
        pack_tens(images, tmp_path / "packed", workers=workers)
    assert "empty file" in str(error.value)
    assert "cannot be decoded" in str(error.value)
    assert "not an image" in str(error.value)
    assert not (tmp_path / "packed").exists()


def test_bad_images_can_be_skipped(images: Path, tmp_path: Path) -> None:
    damage(images)
    manifest = pack_tens(images, tmp_path / "packed", skip_bad=True)
    assert (manifest.num_samples, manifest.info["skipped"]) == (20, 3)
    assert len(stock_samples(tmp_path / "packed")) == 20


def test_only_bad_images_make_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(b"text")
    with pytest.raises(DataError, match=r"a\.png: not an image"):
        pack_tens(tmp_path / "images", tmp_path / "packed", skip_bad=True)
    assert not (tmp_path / "packed").exists()


def test_jpeg_bytes_are_kept_and_samples_without_class_have_no_label(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8), (200, 10, 10)).save(tmp_path / "images/Photo.JPEG")
    manifest = pack_tens(tmp_path / "images", tmp_path / "packed", split="val")
    (sample,) = stock_samples(tmp_path / "packed")
    assert sample["jpg"] == (tmp_path / "images/Photo.JPEG").read_bytes()
    assert (sample["__key__"], "cls" in sample, manifest.classes) == ("Photo", False, ())
    assert manifest.shards[0].name == "val-000000.tar"


def test_listing_is_packed(images: Path, tmp_path: Path) -> None:
    rows = [f"{path.relative_to(images)},{path.parent.name}" for path in sorted(images.rglob("*.png"))]
    (images / "list.csv").write_text("\n".join(["path,label", *rows]))
    from_listing = pack_tens(images / "list.csv", tmp_path / "listing")
    (images / "list.csv").unlink()
    assert from_listing.digest == pack_tens(images, tmp_path / "folder").digest


def test_fashion_mnist_is_packed(tmp_path: Path) -> None:
    folder = Path("/usr/share/datasets/fashion-mnist")
    assert folder.exists(), "install the Debian package dataset-fashion-mnist, as `make test` does for root"
    manifest = pack("fashion-mnist", str(tmp_path / "val"), split="val", limit=500, samples_per_shard=200, workers=2)
    assert [shard.samples for shard in manifest.shards] == [200, 200, 100]
    # The same on every machine: no compressor is involved.
    assert manifest.digest == "ef69d8a8f8469618b9ddeb24aaf138063e0b438ba16d74920843e933021fd48b"
    images = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:]
    samples = stock_samples(tmp_path / "val")
    assert len({sample["__key__"] for sample in samples}) == 500
    for sample in samples:
        number = int(sample["__key__"].removeprefix("t10k-"))
        pixels = Image.open(io.BytesIO(sample["png"])).tobytes()
        assert pixels == images[number * 784 : (number + 1) * 784]
        assert int(sample["cls"]) == labels[number]


def test_fashion_mnist_has_no_other_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fashion-mnist: split `dev`: there are train, val, test"):
        pack("fashion-mnist", str(tmp_path / "dev"), split="dev")


def test_bad_requests_are_refused_before_anything_is_written(images: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").touch()
    (tmp_path / "file").touch()
    requests = [
        (tmp_path / "nowhere", "x", {}, "no such file or folder; give a folder of images"),
        (tmp_path / "file", "x", {}, "not a folder, .csv, .tsv or tar file"),
        (images, "full", {}, "not empty, and holds no packed dataset"),
        (images, "file", {}, "cannot be written"),
        (images, "file/x", {}, "cannot be written"),
        (images, "images/x", {}, "lies in the source folder"),
        (images, "images", {}, "lies in the source folder"),
        (images, "x", {"limit": 0}, "limit: 0, must be at least 1"),
        (images, "x", {"samples_per_shard": 0}, "samples_per_shard: 0"),
        (images, "x", {"split": "a/b"}, "split `a/b`: use letters"),
        (images, "x", {"classes": ["disc"]}, "3 problems"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for source, dest, options, message in requests:
        with pytest.raises(DataError, match=message):
            pack_tens(source, tmp_path / dest, **options)
    with pytest.raises(DataError, match="packing writes to a local folder"):
        pack(str(images), "s3://bucket/x")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    terabyte = 1 << 40
    for number in range(shutil.disk_usage(tmp_path).free // terabyte + 1):
        with (tmp_path / f"images/{number}.png").open("wb") as file:
            file.truncate(terabyte)  # a sparse file: it takes no space
    with pytest.raises(DataError, match=r"needs up to \d+\.\d+ GB, \d+\.\d+ GB are free"):
        pack_tens(tmp_path / "images", tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_shapes_of_the_same_seed_are_the_same(tmp_path: Path) -> None:
    assert make_shapes(tmp_path / "a", 20).digest == make_shapes(tmp_path / "b", 20).digest
    assert make_shapes(tmp_path / "c", 20, seed=1).digest != make_shapes(tmp_path / "a", 20).digest
