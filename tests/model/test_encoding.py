"""Fourier features and the byte array by the paper's formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from perceiver_cli.model.encoding import ByteArrayEncoding, Segment, fourier_features, grid_positions
from perceiver_cli.preprocess.base import Layout


def test_features_are_the_formula_in_the_official_order() -> None:
    positions = torch.tensor([[0.3, -0.7]])
    found = fourier_features(positions, 3, (10.0, 6.0))[0]
    expected = [0.3, -0.7]
    for function in (math.sin, math.cos):
        for x, top in ((0.3, 5.0), (-0.7, 3.0)):
            expected += [function(f * math.pi * x) for f in (1.0, (1 + top) / 2, top)]  # f_1 = 1, f_K = mu / 2
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("dims", "bands", "channels"), [(1, 64, 129), (2, 64, 258), (3, 64, 387), (3, 16, 99), (2, 0, 2)]
)
def test_width_is_d_times_2k_plus_1(dims: int, bands: int, channels: int) -> None:
    assert fourier_features(torch.zeros(4, dims), bands, (8.0,) * dims).shape == (4, channels)
    assert Layout((2,) * dims, 0, dims, bands, (8.0,) * dims).position_channels == channels


def test_features_stay_float32_under_autocast() -> None:
    positions = grid_positions((224,))
    exact = fourier_features(positions, 64, (224.0,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fourier_features(positions, 64, (224.0,))
    assert found.dtype == torch.float32
    assert torch.equal(found, exact)


def test_grid_positions_run_from_end_to_end_row_major() -> None:
    positions = grid_positions((3, 5))
    assert positions.shape == (15, 2)
    assert positions[0].tolist() == [-1, -1]
    assert positions[4].tolist() == [-1, 1]
    assert positions[5].tolist() == [0, -1]
    assert positions[-1].tolist() == [1, 1]


def test_byte_array_of_an_image_has_261_columns() -> None:
    layout = Layout((4, 4), 3, 2, 64, (224.0, 224.0), mean=(10.0, 20.0, 30.0), std=(2.0, 4.0, 5.0))
    values = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8)
    rows = ByteArrayEncoding({"image": layout}, 4)({"image": Segment(values)})
    assert rows.shape == (2, 16, 261)
    expected = (values.double() - torch.tensor([10, 20, 30])) / torch.tensor([2, 4, 5])
    torch.testing.assert_close(rows[..., :3], expected.reshape(2, 16, 3).float())
    assert torch.equal(rows[0, :, 3:], rows[1, :, 3:])


def test_modalities_get_one_width_and_their_own_learned_ending() -> None:
    layouts = {"b": Layout((5,), 2, 1, 3, (5.0,)), "a": Layout((2, 2), 1, 2, 1, (2.0, 2.0))}
    encoding = ByteArrayEncoding(layouts, 4)
    with torch.no_grad():
        encoding.modality_encodings["a"].fill_(1.0)
        encoding.modality_encodings["b"].fill_(2.0)
    rows = encoding({"a": Segment(torch.zeros(1, 2, 2, 1)), "b": Segment(torch.zeros(1, 5, 2))})
    assert rows.shape == (1, 9, 9 + 4)  # b is the widest with 2 + 7 columns, and has room for 4
    assert (rows[0, :4, 7:] == 1).all()
    assert (rows[0, 4:, 9:] == 2).all()


def test_nothing_of_fourier_width_is_saved() -> None:
    encoding = ByteArrayEncoding({"image": Layout((4, 4), 3, 2, 64, (4.0, 4.0))}, 4)
    encoding({"image": Segment(torch.zeros(1, 4, 4, 3))})
    assert encoding.state_dict() == {}
