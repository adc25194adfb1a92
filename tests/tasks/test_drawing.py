"""Pictures of predictions: the right colors in the right places."""

import numpy as np

from deq_flax.tasks.drawing import OVERLAY, WRONG, colors, labeled_grid, overlays


def test_colors_are_distinct():
    table = colors(19).astype(int)
    distance = np.abs(table[:, None] - table[None]).sum(axis=2) + 1000 * np.eye(19)
    assert distance.min() > 40


def test_overlays_show_image_truth_and_prediction_side_by_side():
    image = np.full((1, 20, 30, 3), 100, np.uint8)
    truth, guess = np.zeros((1, 20, 30), np.uint8), np.ones((1, 20, 30), np.uint8)
    truth[:, :, 15:] = 255
    picture = overlays(image, truth, guess, ("sky", "road"), 255)
    table = colors(2)
    assert (picture[10, 5] == 100).all()
    np.testing.assert_array_equal(picture[10, 34 + 5], np.rint(0.4 * 100 + OVERLAY * table[0]))
    np.testing.assert_array_equal(picture[10, 68 + 5], np.rint(0.4 * 100 + OVERLAY * table[1]))
    assert (picture[10, 34 + 20] == 50).all() and (picture[10, 68 + 20] == 50).all()
    assert picture.shape[0] > 20  # the legend


def test_wrong_predictions_have_a_red_frame():
    images = np.zeros((2, 8, 8, 1), np.uint8)
    picture = labeled_grid(images, np.array([0, 1]), np.array([[0.9, 0.1], [0.8, 0.2]]), ("cat", "dog"))
    red = (picture == WRONG).all(axis=2)
    assert not red[:90, :96].any() and red[0, 100:196].all()
