import io
import pickle
import shutil
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from orchestrate.data.index import load_manifest
from orchestrate.data.indexing import index
from orchestrate.data.order import Order
from orchestrate.data.pack import pack
from orchestrate.data.reader import DamagedSampleError, Reader
from orchestrate.data.shards import load_sidecar
from orchestrate.data.stock import ShardSource
from tests.data.tars import write_tar
from tests.datasets import draw_shapes


def written_by_stock(folder: Path, num_samples: int = 23) -> list[dict[str, Any]]:
    """Shards of ten samples by webdataset's own ShardWriter; returns what was written."""
    folder.mkdir()
    random = np.random.default_rng(0)
    samples = []
    with webdataset.ShardWriter(f"{folder}/shard-%04d.tar", maxcount=10, verbose=0) as writer:
        for number in range(num_samples):
            image = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (8, 9, 3), dtype=np.uint8)).save(image, "PNG")
            sample = {
                "__key__": f"set.1/{number:04d}",
                "png": image.getvalue(),
                "cls": number % 4,
                "meta.json": {"n": number},
            }
            writer.write(sample)
            samples.append(sample)
    return samples


def test_we_read_what_stock_writes(tmp_path: Path) -> None:
    written = written_by_stock(tmp_path / "shards")
    assert index(str(tmp_path / "shards")).counts == {}
    reader = Reader(str(tmp_path / "shards"))
    for number, sample in enumerate(written):
        raw = reader.read(number)
        assert (raw.key, raw.image, raw.label) == (sample["__key__"], sample["png"], sample["cls"])


def test_stock_reads_what_we_pack(tmp_path: Path) -> None:
    draw_shapes(tmp_path / "images", 23, size=8)
    pack(str(tmp_path / "images"), str(tmp_path / "packed"), samples_per_shard=10, workers=1)
    urls = sorted(map(str, (tmp_path / "packed").glob("*.tar")))
    stock = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("rgb8").to_tuple("png", "cls")
    samples = list(stock)
    reader = Reader(str(tmp_path / "packed"))
    assert len(samples) == 23
    for number, (pixels, label) in enumerate(samples):
        raw = reader.read(number)
        assert raw.label == label
        assert np.array_equal(np.array(Image.open(io.BytesIO(raw.image)).convert("RGB")), pixels)


def test_stock_stages_run_on_our_order(tmp_path: Path) -> None:
    written = written_by_stock(tmp_path / "shards")
    index(str(tmp_path / "shards"))
    source = ShardSource(str(tmp_path / "shards"), global_batch=8, seed=3, num_steps=3)
    stages = (webdataset.decode("rgb8"), webdataset.rename(image="png", label="cls"),
              webdataset.map_dict(label=lambda label: -label),
              webdataset.to_tuple("image", "label", "meta.json", "__key__"),
              webdataset.batched(8, collation_fn=list))  # fmt: skip
    batches = list(webdataset.DataPipeline(source, *stages))
    order = Order(23, 3, global_batch=8)
    assert [len(batch) for batch in batches] == [8, 8, 8]
    for step, batch in enumerate(batches):
        for sample_id, (image, label, meta, key) in zip(order.batch(step)[0], batch, strict=True):
            expected = written[sample_id]
            assert (key, label, meta["n"]) == (expected["__key__"], -expected["cls"], sample_id)
            assert np.array_equal(image, np.array(Image.open(io.BytesIO(expected["png"]))))


def test_each_sample_comes_once_an_epoch_over_all_ranks(tiny_dataset: str) -> None:
    whole = [sample["__sample_id__"] for sample in ShardSource(tiny_dataset, global_batch=97, num_steps=2)]
    assert sorted(whole[:97]) == sorted(whole[97:]) == list(range(97))
    ranks = [
        list(ShardSource(tiny_dataset, global_batch=12, rank=rank, world_size=3, num_steps=9)) for rank in range(3)
    ]
    one = list(ShardSource(tiny_dataset, global_batch=12, num_steps=9))
    by_step = [rank[step * 4 : step * 4 + 4] for step in range(9) for rank in ranks]
    assert [sample for part in by_step for sample in part] == one
    resumed = list(ShardSource(tiny_dataset, global_batch=12, start_step=5, num_steps=4))
    assert resumed == one[60:]


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_come_in_order_from_any_number_of_workers(tiny_dataset: str, workers: int) -> None:
    def pipeline() -> Any:
        source = ShardSource(tiny_dataset, global_batch=8, num_steps=7)
        return webdataset.DataPipeline(source, webdataset.to_tuple("__sample_id__"), webdataset.batched(8))

    loader = DataLoader(pipeline(), batch_size=None, num_workers=workers)
    expected = [batch[0].tolist() for batch in pipeline()]
    assert [batch[0].tolist() for batch in loader] == expected


def test_source_goes_to_spawned_workers(tiny_dataset: str) -> None:
    source = ShardSource(tiny_dataset, global_batch=8, num_steps=2)
    expected = list(source)
    assert list(pickle.loads(pickle.dumps(source))) == expected


def test_remote_samples_are_the_same(tiny_dataset: str) -> None:
    fsspec.filesystem("memory").put(tiny_dataset, "/stock/train", recursive=True)
    remote, local = (
        list(ShardSource(url, global_batch=32, num_steps=4)) for url in ("memory://stock/train", tiny_dataset)
    )
    assert all(sample.pop("__url__").startswith("memory://stock/train/train-0000") for sample in remote)
    assert [sample.pop("__url__") for sample in local]
    assert remote == local


def test_damaged_sample_is_named(tiny_dataset: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_dataset, tmp_path / "copy"))
    data = bytearray((copy / "train-000003.tar").read_bytes())
    data[load_sidecar(str(copy / "train-000003.tar.idx"))[0][0] - 600] ^= 1
    (copy / "train-000003.tar").write_bytes(data)
    with pytest.raises(DamagedSampleError, match=r"train-000003\.tar: sample 0 \(id 30\).*CRC32"):
        list(ShardSource(str(copy), global_batch=97, num_steps=1))


def test_two_splits_with_equal_file_names_stay_apart(tmp_path: Path) -> None:
    """Stock webdataset caches by base name and serves training samples for validation."""
    for split, number in (("train", 1), ("val", 2)):
        write_tar(tmp_path / f"{split}/000000.tar", [("a.jpg", b"%d" % number)])
        index(str(tmp_path / split), dest=str(tmp_path / f"index/{split}"))
    for split, contents in (("train", b"1"), ("val", b"2")):
        (sample,) = ShardSource(str(tmp_path / f"index/{split}"), global_batch=1, num_steps=1)
        assert sample["jpg"] == contents
    digests = {load_manifest(str(tmp_path / f"index/{split}")).digest for split in ("train", "val")}
    assert len(digests) == 2
