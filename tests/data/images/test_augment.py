"""Augmentation, against a loop over examples and against what geometry allows."""

import numpy as np
import pytest

from deq_flax.data.images.augment import center_boxes, mirror, pad_crop, random_flips, resized_crop_boxes, scaled_crops

IMAGES = np.random.default_rng(0).integers(1, 255, (64, 6, 5, 3), dtype=np.uint8)


def test_pad_crop_is_a_shift_filled_with_zeros():
    cropped = pad_crop(IMAGES, 2, np.random.default_rng(1))
    padded = np.pad(IMAGES, ((0, 0), (2, 2), (2, 2), (0, 0)))
    seen = set()
    for image, source in zip(cropped, padded, strict=True):
        places = [(y, x) for y in range(5) for x in range(5) if np.array_equal(image, source[y : y + 6, x : x + 5])]
        assert len(places) == 1
        seen.update(places)
    assert {y for y, _ in seen} == {x for _, x in seen} == set(range(5))


def test_no_padding_changes_nothing():
    np.testing.assert_array_equal(pad_crop(IMAGES, 0, np.random.default_rng(0)), IMAGES)


def test_images_and_labels_are_mirrored_alike():
    which = random_flips(64, np.random.default_rng(2))
    assert 16 < which.sum() < 48
    for images in (IMAGES, IMAGES[..., 0]):
        for image, source, flipped in zip(mirror(images, which), images, which, strict=True):
            np.testing.assert_array_equal(image, source[:, ::-1] if flipped else source)


def test_resized_crops_have_the_published_areas_and_ratios():
    sizes = np.tile([[500, 375], [32, 32], [60, 80]], (300, 1)).T
    boxes = resized_crop_boxes(*sizes, np.random.default_rng(0))
    area = boxes.width_B * boxes.height_B / np.prod(sizes, axis=0)
    ratio = boxes.width_B / boxes.height_B
    assert 0.08 <= area.min() < 0.1 and 0.9 < area.max() <= 1
    assert 3 / 4 - 1e-9 <= ratio.min() < 0.78 and 1.3 < ratio.max() <= 4 / 3 + 1e-9
    assert (boxes.left_B >= 0).all() and (boxes.left_B + boxes.width_B <= sizes[0] + 1e-9).all()
    assert (boxes.upper_B >= 0).all() and (boxes.upper_B + boxes.height_B <= sizes[1] + 1e-9).all()


@pytest.mark.parametrize(("width", "height", "box"), [(1000, 10, (13.3333, 10)), (10, 1000, (10, 13.3333))])
def test_a_thin_image_gives_its_center(width, height, box):
    boxes = resized_crop_boxes(np.array([width]), np.array([height]), np.random.default_rng(0))
    np.testing.assert_allclose((boxes.width_B[0], boxes.height_B[0]), box, rtol=1e-4)
    np.testing.assert_allclose((boxes.left_B * 2 + boxes.width_B, boxes.upper_B * 2 + boxes.height_B), [[width], [height]])


def test_the_center_box_is_that_of_resizing_first():
    boxes = center_boxes(np.array([512]), np.array([1024]), size=224, resize=256)
    np.testing.assert_allclose(boxes.corners(0), (32, 288, 480, 736))


def test_scaled_crops_stay_inside_and_keep_the_scale():
    widths, heights = np.full(500, 480), np.full(500, 360)
    crops = scaled_crops(widths, heights, crop=(300, 400), scales=(0.5, 1.0, 2.0), random=np.random.default_rng(0))
    assert set(map(tuple, crops.sizes_B2.tolist())) == {(240, 180), (400, 300)}  # at half the size, all of the image
    scale = crops.sizes_B2[:, 0] / crops.boxes.width_B
    assert set(np.round(scale, 6)) == {0.5, 1.0, 2.0}
    assert (crops.boxes.left_B + crops.boxes.width_B <= 480 + 1e-9).all()
    assert (crops.boxes.upper_B + crops.boxes.height_B <= 360 + 1e-9).all()
    assert len(set(crops.boxes.left_B[scale == 2.0])) > 100
