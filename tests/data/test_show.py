"""What a dataset looks like, in numbers and in pictures."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from orchestrate.cli import app
from orchestrate.data.images import decode
from orchestrate.data.index import load_manifest
from orchestrate.data.order import Order
from orchestrate.data.pack import pack
from orchestrate.data.reader import Reader
from orchestrate.data.show import contact_sheet, describe
from orchestrate.data.shuffle_quality import shuffle_quality
from orchestrate.errors import DataError
from ssl_methods.views import make_views, recipe
from tests.data.object_store import ObjectStore, object_store
from tests.datasets import draw_shapes, make_shapes

__all__ = ["object_store"]

GAP = 4  # of a sheet, pixels


def folder_of_squares(folder: Path, sizes: dict[str, tuple[int, int]], each: int = 1) -> Path:
    """Write `each` images of one colour to a class folder for each (width, height)."""
    for name, size in sizes.items():
        (folder / name).mkdir(parents=True)
        for number in range(each):
            Image.new("RGB", size, (10 * number, 90, 200)).save(folder / name / f"{name}{number}.png")
    return folder


def test_counts_are_those_of_the_pack(tiny_dataset: str):
    found = describe(tiny_dataset, global_batch=8)
    assert (found.num_samples, found.num_shards, found.samples_per_shard) == (97, 10, (7, 10))
    assert found.num_bytes == sum(shard.bytes for shard in load_manifest(tiny_dataset).shards)
    assert found.classes == ("disc", "square", "triangle", "cross")
    assert found.class_counts == (25, 24, 24, 24)
    assert set(found.image_sizes) == {(28, 28)}
    assert found.damaged == 0


def test_mixing_is_that_of_the_labels_in_the_tars(tiny_dataset: str):
    found, reader, order = (
        describe(tiny_dataset, global_batch=8, seed=3),
        Reader(tiny_dataset),
        Order(97, 3, global_batch=8),
    )
    labels = np.array([reader.read(sample_id).label for sample_id in range(97)])
    counts = np.bincount(labels)
    assert found.quality == shuffle_quality(order, labels.__getitem__, class_counts=counts, num_batches=100)


def test_text_names_what_matters(tiny_dataset: str):
    text = describe(tiny_dataset, global_batch=8).as_text()
    assert "samples  97 in 10 shards of 7 to 10" in text
    assert "images   28 x 28 pixels" in text
    assert "classes  4 of 24 to 25 samples, median 24" in text
    assert "disc             25 ##############################" in text
    assert "means over all 12 global batches of an epoch" in text
    assert "warning" not in text
    assert "damaged" not in text


def test_shards_sorted_by_class_are_warned_of(tmp_path: Path):
    sizes = {f"class{number:02d}": (4, 4) for number in range(40)}
    source = folder_of_squares(tmp_path / "images", sizes, each=25)
    for shuffle_seed, warned in ((None, True), (0, False)):
        dest = str(tmp_path / f"packed-{shuffle_seed}")
        pack(str(source), dest, shuffle_seed=shuffle_seed, workers=1)
        # A prime above 512 leaves one lane, and a batch is then one block: 16 chunks of 32 neighbours.
        found = describe(dest, global_batch=521)
        assert found.quality is not None
        assert found.quality.is_low == warned
        assert ("warning: neighbours in the shards are of one class" in found.as_text()) == warned


def test_sizes_of_images_are_sorted_by_area(tmp_path: Path):
    source = folder_of_squares(tmp_path / "images", {"b": (40, 30), "a": (8, 12), "c": (20, 20)})
    pack(str(source), str(tmp_path / "packed"), workers=1)
    found = describe(str(tmp_path / "packed"), global_batch=2)
    assert found.image_sizes == ((8, 12), (20, 20), (40, 30))
    assert "20 x 20 pixels (median of 3), 8 x 12 to 40 x 30" in found.as_text()


def test_many_classes_are_shown_by_the_ends_of_the_list(tmp_path: Path):
    source = folder_of_squares(tmp_path / "images", {f"class{number:02d}": (4, 4) for number in range(30)})
    Image.new("RGB", (4, 4)).save(source / "class29" / "another.png")
    pack(str(source), str(tmp_path / "packed"), workers=1)
    text = describe(str(tmp_path / "packed"), global_batch=4).as_text()
    assert "class29          2 ##############################" in text
    assert "... 10 more ..." in text
    assert "class15" not in text


def test_unlabelled_data_have_neither_classes_nor_mixing(tmp_path: Path):
    draw_shapes(tmp_path / "images", 12)
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (tmp_path / "images").rglob("*.png"):
        path.rename(flat / path.name)
    pack(str(flat), str(tmp_path / "packed"), workers=1)
    found = describe(str(tmp_path / "packed"), global_batch=4)
    assert (found.class_counts, found.quality) == ((), None)
    assert "none: the samples have no labels" in found.as_text()


def test_damaged_samples_are_counted_and_left_out_of_the_sheet(tmp_path: Path):
    url = str(tmp_path / "packed")
    make_shapes(url, 12, samples_per_shard=6)
    damage_sample(url, 0)
    found = describe(url, global_batch=4)
    assert found.damaged == 1
    assert sum(found.class_counts) >= 11  # the manifest may still count it
    assert "damaged  1 of the samples" in found.as_text()
    whole = contact_sheet(url, recipe("small_grey", 28), num_samples=12)
    assert whole.shape[0] == 11 * (28 + GAP) + GAP


def test_damaged_samples_are_counted_even_if_only_their_labels_are_read(tmp_path: Path):
    url = str(tmp_path / "packed")
    make_shapes(url, 97)
    damage_sample(url, 2)  # of 97 samples 64 are decoded: 0, 1, 3 and so on
    assert describe(url, global_batch=4).damaged == 1


def test_a_sheet_of_nothing_but_damage_is_refused(tmp_path: Path):
    url = str(tmp_path / "packed")
    make_shapes(url, 1)
    damage_sample(url, 0)
    with pytest.raises(DataError, match=f"{url}: none of the samples that were tried can be decoded"):
        contact_sheet(url, recipe("small_grey", 28), num_samples=3)


def test_sheet_shows_originals_and_their_views(tiny_dataset: str):
    views = recipe("small_dino", 28)
    sheet = contact_sheet(tiny_dataset, views, num_samples=3, seed=5)
    assert sheet.shape == (3 * (28 + GAP) + GAP, GAP + 3 * (28 + GAP) + 2 * (16 + GAP), 3)
    reader = Reader(tiny_dataset)
    for row, sample_id in enumerate((0, 32, 64)):
        image = decode(reader.read(sample_id).image)
        made = make_views(image, views, seed=5, epoch=0, sample_id=sample_id)
        left, top = GAP, GAP + row * (28 + GAP)
        for part in (image, *made):
            height, width, _ = part.shape
            assert np.array_equal(sheet[top : top + height, left : left + width], part)
            left += width + GAP


def test_command_tells_and_draws(tiny_dataset: str, tmp_path: Path):
    sheet = tmp_path / "sheet.png"
    result = show(tiny_dataset, "--batch", "8", "--views", "small_grey", "--size", "28", "--image", str(sheet))
    assert result.exit_code == 0
    assert describe(tiny_dataset, global_batch=8).as_text() in result.stdout
    drawn = contact_sheet(tiny_dataset, recipe("small_grey", 28), num_samples=8)
    assert np.array_equal(np.asarray(Image.open(sheet)), drawn)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--views", "nonsense", "--image", "sheet.png"], "view recipe 'nonsense': unknown; choose from "),
        (["--image", "no/such/folder.png"], "no/such/folder.png: cannot be written: "),
        (["--image", "sheet.doc"], "sheet.doc: cannot be written: "),
    ],
)
def test_command_refuses_what_it_cannot_draw(tiny_dataset: str, words: list[str], message: str):
    result = show(tiny_dataset, "--size", "28", *words)
    assert (result.exit_code, result.stderr.count("Traceback")) == (2, 0)
    assert message in result.stderr


def show(*words: str) -> Result:
    return CliRunner().invoke(app, ["data", "show", *words], env={"TERM": "dumb"})


def test_originals_of_any_shape_fit_their_square(tmp_path: Path):
    source = folder_of_squares(tmp_path / "images", {"wide": (60, 20)})
    Image.new("L", (10, 90), 128).save(source / "wide" / "tall.png")  # grey: one channel
    pack(str(source), str(tmp_path / "packed"), workers=1)
    sheet = contact_sheet(str(tmp_path / "packed"), recipe("small_grey", 28), num_samples=2)
    originals = [sheet[top : top + 28, GAP : GAP + 28] for top in (GAP, GAP + 28 + GAP)]
    covered = sorted((int((square != 255).any(2).any(1).sum()), int((square != 255).any(2).any(0).sum()))
                     for square in originals)  # fmt: skip
    assert covered == [(9, 28), (28, 3)]


def test_a_dataset_in_an_object_store_is_described_alike(
    tiny_dataset: str, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
):
    object_store.use(monkeypatch)
    url = object_store.upload(tiny_dataset, "show")
    remote, local = describe(url, global_batch=8), describe(tiny_dataset, global_batch=8)
    assert remote.image_sizes == local.image_sizes
    assert remote.quality is not None
    assert remote.quality.num_batches == 2  # each sample is a request
    assert np.array_equal(
        *(contact_sheet(each, recipe("small_grey", 28), num_samples=4) for each in (url, tiny_dataset))
    )


def damage_sample(url: str, sample_id: int) -> None:
    """Flip a bit of a sample in the first shard."""
    path, place = Path(url) / load_manifest(url).shards[0].name, Reader(url).place(sample_id)
    data = bytearray(path.read_bytes())
    data[place.start + 600] ^= 1
    path.write_bytes(data)
