"""Folders of one's own: which files are images, of which class, for training or evaluation; and what is said of the others."""

import itertools
import os
import shutil
import time

import numpy as np
import pytest
from PIL import Image, ImageFile
from torchvision.datasets import ImageFolder

from cifar_resnet import Recipe
from cifar_resnet.data import cache, folders
from cifar_resnet.data.datasets import load
from cifar_resnet.data.folders import image_files
from cifar_resnet.errors import DataError, UsageError

CLASSES = ("cats", "dogs")


def image(path, values=None, seed=0):
    """Writes an image, of noise if not given, in the format of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if values is None:
        values = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def pets(folder, parts=("train", "test"), classes=CLASSES, count=3):
    """A folder of `count` PNG files in each class of each part."""
    for number, (part, name) in enumerate((part, name) for part in parts for name in classes):
        for i in range(count):
            image(folder / part / name / f"{i}.png", seed=100 * number + i)
    return folder


@pytest.fixture
def own(tmp_path):
    return pets(tmp_path / "pets")


def read(folder, notify=lambda message: None, progress=lambda done, total: None, **fields):
    return load(Recipe.build(dataset=str(folder), batch_size=1, **fields), notify=notify, progress=progress)


def refusal(folder, kind=DataError, **fields):
    with pytest.raises(kind) as error:
        read(folder, **fields)
    assert "\n" not in str(error.value)
    return str(error.value)


# Which files are images


def test_files_come_in_the_order_of_torchvisions_image_folder(tmp_path):
    names = ["b.png", "a.jpg", "deep/c.png", "deep-er/d.webp", "deep/er/e.PNG", "C.png", "10.png", "9.jpeg"]
    for part in ("train", "test"):
        for name in CLASSES:
            for i, file in enumerate(names):
                image(tmp_path / part / name / file, seed=i)
    expected = [os.path.relpath(path, tmp_path / "train").replace(os.sep, "/") for path, _ in ImageFolder(tmp_path / "train").samples]
    loaded = read(tmp_path)
    assert loaded.train.names.tolist() == expected
    assert loaded.train.labels.tolist() == [0] * 8 + [1] * 8


JUNK = [
    ".DS_Store",
    "._0.png",
    "Thumbs.db",
    "desktop.ini",
    ".hidden.png",
    "__MACOSX/0.png",
    ".ipynb_checkpoints/0.png",
    "@eaDir/0.png",
]


@pytest.mark.parametrize("where", ["", "train", "train/cats"])
def test_what_systems_leave_is_neither_class_nor_image(own, where):
    said = []
    for name in JUNK:
        image(own / where / "x.png")
        (own / where / name).parent.mkdir(exist_ok=True)
        shutil.move(own / where / "x.png", own / where / name)
    loaded = read(own, said.append)
    assert loaded.classes == CLASSES
    assert (len(loaded.train), said) == (6, [])
    assert image_files(own / where)[1] == []


def test_what_is_an_image_is_decided_by_content_and_what_is_not_is_counted(own, tmp_path):
    for i, suffix in enumerate(["gif", "jfif", "jp2", "tif", "BMP", "JPG", "ppm", "avif"]):
        image(tmp_path / f"x.{ {'jfif': 'jpg'}.get(suffix, suffix) }", seed=i).rename(own / "train" / "cats" / f"x{i}.{suffix}")
    shutil.copy(own / "test" / "cats" / "0.png", own / "train" / "dogs" / "without-suffix")
    shutil.copy(own / "test" / "cats" / "0.png", own / "train" / "dogs" / "named.txt")
    for i in range(12):
        (own / "train" / "dogs" / f"note{i:02}.txt").write_text("no image")
    (own / "test" / "dogs" / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    said = []
    loaded = read(own, said.append)
    assert np.bincount(loaded.train.labels).tolist() == [11, 5]
    assert len(said) == 1
    assert "13 files are no images and are left out: train/dogs/note00.txt, train/dogs/note01.txt".replace("/", os.sep) in said[0]
    assert "note09.txt and 3 more" in said[0]
    assert "pip install pillow-heif" in said[0]
    images, others = image_files(own / "train" / "dogs")
    assert [path.name for path in images] == ["0.png", "1.png", "2.png", "named.txt", "without-suffix"]
    assert len(others) == 12


@pytest.mark.posix
def test_links_are_followed_once_and_loops_end(own, tmp_path):
    image(tmp_path / "elsewhere" / "far.png")
    cats = own / "train" / "cats"
    (cats / "linked.png").symlink_to(tmp_path / "elsewhere" / "far.png")
    (cats / "more").symlink_to(tmp_path / "elsewhere")
    (cats / "self").symlink_to(cats)
    (cats / "up").symlink_to(own)
    for a in "abc":  # each of three folders leads to the two others
        (cats / a).mkdir()
        for b in "abc":
            if a != b:
                (cats / a / b).symlink_to(cats / b)
    names = [name for name in read(own).train.names.tolist() if name.startswith("cats")]
    assert names[:5] == ["cats/0.png", "cats/1.png", "cats/2.png", "cats/linked.png", "cats/more/far.png"]
    (own / "train" / "birds").symlink_to(tmp_path / "elsewhere")
    (own / "test" / "birds").symlink_to(tmp_path / "elsewhere")
    assert read(own).classes == ("birds", *CLASSES)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are of POSIX")
def test_a_pipe_is_no_image(own):
    os.mkfifo(own / "train" / "cats" / "pipe.png")
    said = []
    assert len(read(own, said.append).train) == 6
    assert said == [f"in {own} 1 file is no image and is left out: train/cats/pipe.png"]


# What is refused, and how


@pytest.mark.posix
def test_all_files_that_cannot_be_read_are_named(own):
    cats = own / "train" / "cats"
    for i in range(12):
        (cats / f"none{i:02}.png").write_bytes(b"")
    (cats / "aa.jpg").symlink_to(cats / "gone.jpg")
    (cats / "a.png").write_bytes((cats / "0.png").read_bytes()[:1500])
    line = refusal(own)
    assert f"{own / 'train'}: 14 of 20 images cannot be used: " in line
    assert "cats/a.png: image file is truncated" in line
    assert "cats/aa.jpg: No such file" in line
    assert "cats/none07.png: is empty and 4 more" in line


def test_empty_classes_and_those_of_one_part_alone_are_named_and_no_others(tmp_path):
    names = [f"class{i:03}" for i in range(40)]
    folder = pets(tmp_path / "many", classes=names, count=1)
    shutil.rmtree(folder / "test" / "class007")
    assert refusal(folder) == f"{folder}: train has class007, which test has not; both need the same classes"
    (folder / "test" / "class007").mkdir()
    (folder / "test" / "class007" / "readme.txt").write_text("no image")
    assert refusal(folder).startswith(f"{folder / 'test'}: no image in class007; ")
    shutil.rmtree(folder / "test" / "class007")
    image(folder / "test" / "Class007" / "0.png")
    line = refusal(folder)
    assert "train has class007, which test has not; test has Class007, which train has not" in line
    assert "class008" not in line


def test_a_single_class_or_none_is_refused(tmp_path):
    assert "holds cats; at least two classes are needed" in refusal(pets(tmp_path / "one", classes=["cats"]))
    image(tmp_path / "flat" / "train" / "0.png")
    image(tmp_path / "flat" / "test" / "0.png")
    assert "holds no folder; at least two classes are needed" in refusal(tmp_path / "flat")


def test_a_folder_that_cannot_be_listed_is_named(own, monkeypatch):
    closed = str(own / "train" / "cats")

    def scandir(path, real=os.scandir):
        if os.fspath(path) == closed:
            raise PermissionError(13, "Permission denied", closed)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert refusal(own) == f"{closed}: Permission denied"


# Which part is for what


@pytest.mark.parametrize("name", ["test", "val", "valid", "validation", "eval", "Test", "VAL"])
def test_the_part_for_evaluation_may_have_several_names(name, tmp_path):
    loaded = read(pets(tmp_path / "pets", parts=("train", name)))
    assert loaded.evaluation.folder == tmp_path / "pets" / name
    assert loaded.evaluated_on == "test"


def test_two_spellings_of_a_part_are_refused(tmp_path):
    for part in ("train", "test"):
        image(tmp_path / "pets" / part / "cat" / "1.png")
        image(tmp_path / "pets" / part / "dog" / "1.png")
    (tmp_path / "pets" / "Train").mkdir(exist_ok=True)
    if len(list((tmp_path / "pets").iterdir())) == 2:
        pytest.skip("one spelling is another here")
    with pytest.raises(UsageError, match="has (Train and train|train and Train), which mean the same; rename one"):
        read(tmp_path / "pets")


def test_a_second_part_for_evaluation_is_said_to_be_unused(tmp_path):
    said = []
    loaded = read(pets(tmp_path / "pets", parts=("train", "val", "test")), said.append)
    assert loaded.evaluation.folder.name == "test"
    assert said == [f"{tmp_path / 'pets' / 'val'} is not used: the run is judged on {tmp_path / 'pets' / 'test'}"]


@pytest.mark.parametrize("part", ["train", ""], ids=["train alone", "classes directly"])
def test_a_share_of_the_images_is_set_apart(part, tmp_path):
    folder = pets(tmp_path / "pets", parts=[part], count=10)
    loaded, again = (read(folder, split=0.2, seed=seed) for seed in (0, 1))
    assert (len(loaded.train), len(loaded.evaluation)) == (16, 4)
    assert np.bincount(loaded.evaluation.labels).tolist() == [2, 2]
    names = [*loaded.train.names, *loaded.evaluation.names]
    assert sorted(names) == sorted(path.relative_to(folder / part).as_posix() for path in (folder / part).glob("*/*.png"))
    assert loaded.evaluation.names.tolist() == again.evaluation.names.tolist()
    assert loaded.train.folder == folder / part


def test_a_split_leaves_each_class_an_image_on_both_sides(tmp_path):
    folder = pets(tmp_path / "pets", parts=[""], count=2)
    for i in range(2, 30):
        image(folder / "dogs" / f"{i}.png", seed=i)
    for share in (0.01, 0.5, 0.99):
        loaded = read(folder, split=share)
        assert all(np.bincount(split.labels, minlength=2).min() >= 1 for split in (loaded.train, loaded.evaluation))
    image(folder / "birds" / "0.png")
    assert "a single image in birds; --split 0.5 needs two in each class" in refusal(folder, split=0.5)


def test_a_class_may_be_called_train(tmp_path):
    folder = pets(tmp_path / "pets", parts=[""], count=4)
    for i in range(4):
        image(folder / "train" / f"{i}.png", seed=i)
    assert read(folder, split=0.5).classes == ("cats", "dogs", "train")
    said = []
    shutil.copytree(folder / "cats", folder / "train" / "cats")
    shutil.copytree(folder / "dogs", folder / "train" / "dogs")
    assert read(folder, said.append, split=0.5).classes == ("cats", "dogs")
    assert f"the classes are the folders of {folder / 'train'}; not used: cats, dogs" in said


def test_images_in_no_folder_of_a_class_are_counted_and_named(tmp_path):
    folder, said = pets(tmp_path / "pets"), []
    image(folder / "train" / "7.png")
    image(folder / "train" / "8.png")
    (folder / "train" / "notes.txt").write_text("no image")
    image(folder / "test" / "9.png")
    read(folder, said.append)
    assert said == [
        f"2 images lie in {folder / 'train'}, in no folder of a class, and are not used: 7.png, 8.png",
        f"1 image lies in {folder / 'test'}, in no folder of a class, and is not used: 9.png",
    ]


def test_parts_that_do_not_fit_say_what_would(tmp_path):
    pets(tmp_path / "train-alone", parts=["train"])
    assert "there is no test; train --split 0.2 sets a fifth" in refusal(tmp_path / "train-alone")
    pets(tmp_path / "direct", parts=[""])
    assert "--split 0.2 sets a fifth" in refusal(tmp_path / "direct")
    pets(tmp_path / "test-alone", parts=["test"])
    assert refusal(tmp_path / "test-alone").endswith("must hold train/CLASS/* and test/CLASS/*: there is no train")
    pets(tmp_path / "both")
    assert "--split 0.3" in refusal(tmp_path / "both", UsageError, split=0.3)
    assert "--split 0.3 is for a folder" in refusal("digits", UsageError, split=0.3)


# The range of values


@pytest.mark.parametrize(("dtype", "suffix"), [(np.float32, "tif"), (np.int32, "tif"), (np.uint16, "png")])
@pytest.mark.parametrize("white", [255, 4095])
def test_values_of_more_than_8_bits_are_judged_by_all_training_images(dtype, suffix, white, tmp_path):
    """So a dark image stays dark, and the same pixels in 8 bits give the same training images."""
    for part in ("train", "test"):
        for name, factor in (("dark", 0.003), ("bright", 1)):
            for i in range(2):
                values = np.random.default_rng(i).integers(0, 256, (32, 32)) * factor
                values[0, 0] = 255 * factor
                image(tmp_path / "deep" / part / name / f"{i}.{suffix}", (values * white / 255).astype(dtype))
                image(tmp_path / "plain" / part / name / f"{i}.png", values.astype(np.uint8))
    deep, plain = read(tmp_path / "deep"), read(tmp_path / "plain")
    assert deep.whites == {np.dtype(dtype).name: white}
    for ours, theirs in ((deep.train, plain.train), (deep.evaluation, plain.evaluation)):
        np.testing.assert_allclose(ours.images.astype(int), theirs.images, atol=1)


def test_evaluation_images_are_read_by_the_values_of_the_training_images(tmp_path):
    for part, top in (("train", 4095), ("test", 200)):
        for name in CLASSES:
            image(tmp_path / part / name / "0.png", np.tile(np.linspace(0, top, 32), (32, 1)).astype(np.uint16))
    assert read(tmp_path).evaluation.images.max() == 200 * 255 // 4095
    image(tmp_path / "test" / "cats" / "1.png", np.full((32, 32), 60000, np.uint16))
    assert f"cats{os.sep}1.png: holds values up to 60000, where white is 4095 in the training images" in refusal(tmp_path)


def test_values_that_no_image_has_are_said_before_training(own, tmp_path, refused):
    image(own / "train" / "cats" / "nan.tif", np.full((32, 32), np.nan, np.float32))
    line = refused(1, "train", "--dataset", own, "--run-dir", tmp_path / "run", "--batch-size", 2)
    assert f"cats{os.sep}nan.tif: holds values that are no numbers" in line
    assert not (tmp_path / "run").exists()


def test_images_without_contrast_are_said(tmp_path):
    for part in ("train", "test"):
        for label, name in enumerate(CLASSES):  # as masks with the numbers of classes are kept
            image(tmp_path / part / name / "0.png", np.full((32, 32), label, np.uint8))
    said = []
    read(tmp_path, said.append)
    assert len(said) == 2
    assert "training images" in said[0]
    assert "within 0 to 1 of 255" in said[0]


# What was read once is kept


@pytest.fixture
def decoded(monkeypatch):
    """The files that are decoded."""
    files = []
    monkeypatch.setattr(folders, "decode", lambda path, real=folders.decode: files.append(path.name) or real(path))
    return files


def test_a_folder_is_read_once(own, decoded):
    steps = []
    first = read(own, progress=lambda *step: steps.append(step))
    assert len(decoded) == 12
    assert steps == [(i, 6) for i in range(1, 7)] * 2
    second = read(own)
    assert len(decoded) == 12
    for a, b in ((first.train, second.train), (first.evaluation, second.evaluation)):
        assert np.array_equal(a.images, b.images)
        assert np.array_equal(a.names, b.names)


def test_that_reading_takes_long_is_said_once_for_each_part_that_is_not_kept(own, monkeypatch):
    said, steps = [], []
    monkeypatch.setattr(folders, "PATIENCE", 0.0)
    read(own, said.append)
    assert [each.rpartition(":")[0] for each in said] == [f"reading 6 images in {own / part}" for part in ("train", "test")]
    next(own.glob("test/*/*")).touch()
    read(own, said.append, lambda *step: steps.append(step))
    assert len(said) == 3
    assert said[2].startswith(f"reading 6 images in {own / 'test'}: about ")
    assert steps == [(i, 6) for i in range(1, 7)]


@pytest.mark.parametrize("change", ["content", "time", "name", "more", "fewer"])
def test_a_folder_that_changed_is_read_again(own, change, decoded):
    read(own)
    decoded.clear()
    file = own / "train" / "cats" / "1.png"
    if change == "content":
        image(file, np.zeros((32, 32, 3), np.uint8))
    elif change == "time":
        os.utime(file, (1, 1))
    elif change == "name":
        file.rename(file.with_name("0a.png"))
    elif change == "more":
        image(file.with_name("3.png"))
    else:
        file.unlink()
    loaded = read(own)
    assert len(decoded) == {"more": 7, "fewer": 5}.get(change, 6)
    expected = [np.asarray(Image.open(own / "train" / name)) for name in loaded.train.names]
    assert np.array_equal(loaded.train.images, expected)


def damages(path):
    content = path.read_bytes()
    middle = len(content) // 2
    yield b""
    yield content[:middle]
    yield content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    yield b"rubbish"
    with np.load(path) as kept:
        arrays = dict(kept)
    for other in ({"images": arrays["images"][1:]}, {"images": arrays["images"].astype(float)}, {"kinds": np.array(["a"])}):
        np.savez(path, **{**arrays, **other})
        yield path.read_bytes()
    np.savez(path, **{**arrays, "images": np.array([{}], object)})  # which only a pickle holds
    yield path.read_bytes()


def test_kept_images_that_are_damaged_are_read_again(own, decoded, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "user_cache", lambda: tmp_path)
    first = read(own)
    kept = sorted((tmp_path / "folders").iterdir())
    assert len(kept) == 2
    for damage in [damage for path in kept[:1] for damage in damages(path)]:
        kept[0].write_bytes(damage)
        decoded.clear()
        loaded = read(own)
        assert len(decoded) == 6
        for a, b in ((first.train, loaded.train), (first.evaluation, loaded.evaluation)):
            assert np.array_equal(a.images, b.images)
    assert sorted((tmp_path / "folders").iterdir()) == kept


def test_what_a_killed_process_left_in_the_cache_goes(own, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "user_cache", lambda: tmp_path)
    read(own)
    kept = sorted((tmp_path / "folders").iterdir())
    half = [path.with_name(f".{path.name}.123456789.part") for path in kept]
    for path, part, hours in zip(kept, half, (0.5, 2), strict=True):
        part.write_bytes(b"half")
        os.utime(part, 2 * (time.time() - 3600 * hours,))
        path.unlink()
    read(own)
    assert sorted((tmp_path / "folders").iterdir()) == sorted([*kept, half[0]])  # which another process may be writing


def test_whites_are_kept_with_the_images(tmp_path, decoded):
    for part in ("train", "test"):
        for i, name in enumerate(CLASSES):
            image(tmp_path / part / name / "0.png", np.full((32, 32), 100 + 3000 * i, np.uint16))
    assert [read(tmp_path).whites for _ in range(2)] == [{"uint16": 4095}] * 2
    assert len(decoded) == 4


@pytest.mark.parametrize("where", [None, "file"])
def test_where_nothing_can_be_kept_images_are_read_all_the_same(own, where, tmp_path, monkeypatch):
    def user_cache():
        if where is None:
            raise DataError("this user has no home folder")
        return tmp_path / where

    (tmp_path / "file").write_text("")
    monkeypatch.setattr(cache, "user_cache", user_cache)
    assert [len(read(own).train) for _ in range(2)] == [6, 6]


def test_a_file_of_a_kind_that_pillow_knows_and_cannot_read_is_no_image(own):
    said = []
    for name, content in (("features.h5", b"\x89HDF\r\n\x1a\n"), ("weather.grib", b"GRIB\0\0\0\1")):
        (own / "train" / "dogs" / name).write_bytes(content + bytes(100))
    assert len(read(own, said.append).train) == 6
    assert "2 files are no images and are left out" in said[0]


@pytest.mark.posix
def test_classes_that_would_be_shown_alike_are_refused(tmp_path):
    pets(tmp_path, classes=("dog", "cat\u200b", "cat\\u200b"))
    assert "two classes would both be shown as cat\\u200b; rename one" in refusal(tmp_path)


@pytest.mark.posix
@pytest.mark.parametrize("parts", [("train", "test"), ("train",)])
def test_a_class_that_is_spelt_in_two_ways_is_refused(parts, tmp_path):
    """As macOS and Linux write the same name."""
    classes = "caf\u00e9", "cafe\u0301"
    pets(tmp_path, parts, classes=("dog", classes[0]))
    pets(tmp_path, parts[-1:], classes=("dog", classes[1]))
    if len(parts) == 2:
        shutil.rmtree(tmp_path / "test" / classes[0], ignore_errors=True)
    else:
        pets(tmp_path, ("test",), classes=("dog", *classes))
    assert "cafe\u0301 is spelt in two ways, an accent being one character or two; rename one" in refusal(tmp_path)


def test_an_image_without_a_suffix_is_one_however_large(own, monkeypatch, recwarn):
    photo = own / "train" / "cats" / "photo"
    photo.with_name("0.png").rename(photo)  # of 1,024 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)  # of more Pillow warns
    assert photo in image_files(own)[0]
    assert not recwarn.list
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)  # and twice as many it refuses
    assert photo in image_files(own)[0]
    assert "has more than 600 pixels" in refusal(own)


def test_images_that_another_program_cut_short_are_not_kept_for_who_refuses_them(tmp_path, monkeypatch):
    for part, name in itertools.product(("train", "test"), ("a", "b")):
        (tmp_path / part / name).mkdir(parents=True)
        for number in range(2):
            noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)
            Image.fromarray(noise).save(tmp_path / part / name / f"{number}.jpg")
    damaged = tmp_path / "train" / "a" / "0.jpg"
    damaged.write_bytes(damaged.read_bytes()[:-900])
    recipe = Recipe(dataset=str(tmp_path), batch_size=2)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert len(load(recipe).train) == 4
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    with pytest.raises(DataError, match="0.jpg: image file is truncated"):
        load(recipe)
