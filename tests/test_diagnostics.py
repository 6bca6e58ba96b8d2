"""Ranks of activations: the numbers, and where they are kept and shown."""

import io
import json
import math
from dataclasses import replace

import numpy
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from rich.console import Console
from torch import nn

from fastplastic import Profile, profile
from fastplastic.cli import overview, render
from fastplastic.cli.main import main
from fastplastic.cli.render import LayerRow, Report
from fastplastic.diagnostics import Ranks, effective_rank, ranks_of, srank, stable_rank
from fastplastic.errors import FileError, InputError

ALL = overview.Shown(layers=True)


def by_hand(matrix):
    """The three ranks, written from their definitions with numpy's singular values."""
    sigma = numpy.linalg.svd(numpy.asarray(matrix, dtype=numpy.float64), compute_uv=False)
    p = sigma[sigma > 0] / sigma.sum()
    k = next(k for k in range(len(sigma) + 1) if sigma[:k].sum() >= 0.99 * sigma.sum())
    norm = numpy.linalg.norm
    stable = norm(matrix, "fro") ** 2 / norm(matrix, 2) ** 2
    return math.exp(-(p * numpy.log(p)).sum()), k, stable


# A single value, few rows, few units, many and as many of both.
@pytest.mark.parametrize("shape", [(1, 1), (37, 101), (256, 128), (64, 64), (1, 9), (1024, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_ranks_are_those_of_numpys_singular_values(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    matrix = (torch.randn(shape, generator=generator).relu() + 0.01).to(dtype)
    for view in (matrix, matrix.T):
        found = ranks_of(view)
        effective, k, stable = by_hand(view.double().numpy())
        assert found.effective_rank == pytest.approx(effective, rel=1e-9)
        assert found.srank == k
        assert found.stable_rank == pytest.approx(stable, rel=1e-9)
        assert (found.rows, found.units) == tuple(view.shape)


def orthogonal(size, seed):
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(square).Q


@pytest.mark.parametrize("size", [1, 7, 200])
def test_an_orthogonal_matrix_has_all_directions(size):
    for matrix in (torch.eye(size), 1e-30 * torch.eye(size), 3e30 * orthogonal(size, 0)):
        found = ranks_of(matrix)
        assert found.effective_rank == pytest.approx(size)
        assert found.stable_rank == pytest.approx(size)
        # 99 % of n equal values.
        assert found.srank == math.ceil(0.99 * size)


def test_a_matrix_of_one_direction():
    found = ranks_of(torch.outer(torch.arange(1.0, 40), torch.linspace(-1, 1, 30)))
    assert found.effective_rank == pytest.approx(1, abs=1e-4)
    assert found.srank == 1
    assert found.stable_rank == pytest.approx(1)


def test_known_singular_values_behind_two_rotations():
    """2, 1, 1, 0, ...: p = 1/2, 1/4, 1/4 has the entropy 1.5 ln 2; 6 / 4 is the stable rank."""
    matrix = orthogonal(50, 1)[:, :3] @ torch.diag(torch.tensor([2.0, 1, 1]).double())
    found = ranks_of(matrix @ orthogonal(20, 2)[:3])
    assert found.effective_rank == pytest.approx(2**1.5)
    assert found.srank == 3
    assert found.stable_rank == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("sigma", "k"), [([99, 1], 1), ([98.9, 1.1], 2), ([1.0] * 100, 99), ([1, 1, 98], 2), ([5], 1)]
)
def test_srank_is_the_first_to_reach_the_share_in_any_order(sigma, k):
    assert srank(torch.tensor(sigma, dtype=torch.float64)) == k


@pytest.mark.parametrize("sigma", [torch.zeros(5), torch.zeros(0)])
def test_no_direction_is_a_rank_of_zero(sigma):
    assert (effective_rank(sigma), srank(sigma), stable_rank(sigma)) == (0, 0, 0)
    assert ranks_of(sigma.expand(3, -1)) == Ranks(0.0, 0, 0.0, 3, len(sigma))


MATRICES = arrays.arrays(
    numpy.float64,
    st.tuples(st.integers(1, 8), st.integers(1, 8)),
    elements=st.floats(-1e3, 1e3, allow_subnormal=False, width=32),
)


@given(matrix=MATRICES, scale=st.sampled_from([1e-6, -1.0, 1e6]))
def test_ranks_are_in_order_and_do_not_depend_on_scale_or_on_the_order_of_rows(matrix, scale):
    matrix = torch.from_numpy(matrix)
    found = ranks_of(matrix)
    if not matrix.any():
        assert found.effective_rank == 0
        return
    most = min(matrix.shape) * (1 + 1e-9)
    assert 1 - 1e-9 <= found.stable_rank <= found.effective_rank * (1 + 1e-9)
    assert found.effective_rank <= most
    assert 1 <= found.srank <= most
    other = ranks_of(scale * matrix.flip(0))
    assert other.effective_rank == pytest.approx(found.effective_rank, rel=1e-6)
    assert other.stable_rank == pytest.approx(found.stable_rank, rel=1e-6)


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (ranks_of, torch.ones(3), "the matrix is torch.float32 (3,), expected a floating-point"),
        (ranks_of, torch.ones(2, 2).int(), "the matrix is torch.int32 (2, 2), expected a floati"),
        (ranks_of, [[1.0]], "the matrix is list, expected a floating-point tensor (rows, units):"),
        (ranks_of, torch.tensor([[1, math.nan, math.inf]]), "the matrix has 2 of 3 values that are"
         " NaN or infinite, expected finite ones: leave out the rows that have some"),
        (srank, torch.ones(1, 2), "sigma is torch.float32 (1, 2), expected a floating-point tensor "
         "(n,): convert it"),
        (stable_rank, torch.tensor([2, -0.5]), "sigma has -0.5, expected no value below 0: pass"),
        (effective_rank, torch.tensor([math.nan]), "sigma has 1 of 1 values that are NaN or inf"),
    ],
)  # fmt: skip
def test_wrong_input_is_refused(function, value, text):
    with pytest.raises(InputError) as error:
        function(value)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


class Mlp(nn.Module):
    """Two layers by name."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.fc2(self.fc1(x).relu())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks") / "profile.safetensors"
    torch.manual_seed(0)
    found = profile(Mlp(), [(torch.randn(5, 3), torch.arange(5) % 2)], ranks=True)
    # One layer without: nothing finite was seen there.
    found = replace(found, layers=(found["fc1"], replace(found["fc2"], ranks=None)))
    found.save(path)
    return found, path


def test_saving_and_loading(saved, tmp_path):
    found, path = saved
    again = Profile.load(path)
    assert again["fc1"].ranks == found["fc1"].ranks == Ranks(**found["fc1"].to_dict()["ranks"])
    assert again["fc2"].ranks is None
    assert again.to_dict() == found.to_dict()
    plain = replace(found, layers=tuple(replace(layer, ranks=None) for layer in found))
    plain.save(tmp_path / "plain")
    with safetensors.safe_open(tmp_path / "plain", framework="pt") as file:
        assert "ranks" not in json.loads(file.metadata()["fastplastic"])


def change(key, value):
    def put(ranks):
        ranks["fc1"][key] = value

    return put


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda ranks: ranks.update(fc9=ranks["fc1"]), "'ranks' is 'fc9', expected names of lay"),
        (lambda ranks: ranks.update(fc1=3), "'fc1' is 3, expected an object; the file is damaged"),
        (lambda ranks: ranks["fc1"].pop("srank"), "'srank' is 'missing', expected an integer"),
        (change("srank", 1.5), "'srank' is 1.5, expected an integer"),
        (change("effective_rank", "x" * 99), "'effective_rank' is 'xxx"),
        (change("effective_rank", math.nan), "ranks of 'fc1' is Ranks(effective_rank=nan"),
        (change("stable_rank", -1.0), "expected 0 to rows or units; the file is damaged"),
        (change("srank", 9), "ranks of 'fc1' is Ranks("),
        (change("units", 9), "ranks of 'fc1' is Ranks("),
        (change("rows", 0), "ranks of 'fc1' is Ranks("),
        (
            lambda ranks: ranks["fc1"].update(
                effective_rank=0.0, srank=0, stable_rank=0.0, rows=0
            ),
            "ranks of 'fc1' is Ranks(effective_rank=0.0, srank=0, stable",
        ),
    ],
)  # fmt: skip
def test_damaged_files(saved, tmp_path, damage, text):
    with safetensors.safe_open(saved[1], framework="pt") as file:
        header = json.loads(file.metadata()["fastplastic"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    damage(header["ranks"])
    path = tmp_path / "damaged"
    safetensors.torch.save_file(tensors, path, {"fastplastic": json.dumps(header)})
    with pytest.raises(FileError) as error:
        Profile.load(path)
    assert text in str(error.value)
    assert str(error.value).startswith(str(path))
    assert len(str(error.value)) < 400


def test_ranks_that_are_no_mapping(saved, tmp_path):
    metadata = {"fastplastic": ""}
    with safetensors.safe_open(saved[1], framework="pt") as file:
        header = json.loads(file.metadata()["fastplastic"]) | {"ranks": [1]}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    metadata["fastplastic"] = json.dumps(header)
    safetensors.torch.save_file(tensors, tmp_path / "damaged", metadata)
    with pytest.raises(FileError, match=r"'ranks' is \[1\], expected an object"):
        Profile.load(tmp_path / "damaged")


RANKS = {"effective_rank": 1023.44, "srank": 1001, "stable_rank": 1.26, "rows": 1024, "units": 2048}
FIRST = LayerRow(
    "layer4.2.conv1", "conv", "relu", 2048, 512, 12, 0, 20, 0, 0.5, 0.12, 1.5e-6, ranks=RANKS
)
REPORT = Report(
    facts=(), rows=(FIRST, replace(FIRST, name="fc", ranks=None)), tau=0.025, saturated=0.95,
    found=2, skipped=(), fixed=(), rank_rows=1024,
)  # fmt: skip


def text(renderable, width):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(renderable)
    return console.file.getvalue()


def titles(rows, width):
    lines = text(render.layer_table(rows, width), width).splitlines()
    return next(line for line in lines if line.startswith("layer ")).split()


def test_columns_of_the_table():
    assert titles(REPORT.rows, 130)[-3:] == ["eff.rank", "srank", "stable"]
    shown = text(render.layer_table(REPORT.rows, 130), 130).splitlines()
    assert shown[2].split()[-3:] == ["1,023.4", "1,001", "1.3"]
    assert shown[3].split()[-3:] == ["-", "-", "-"]
    assert "srank" not in titles([replace(FIRST, ranks=None)], 130)


def test_narrow_tables_drop_them_after_all_others():
    dropped = []
    for width in range(130, 45, -1):
        shown = titles([replace(FIRST, name="fc")], width)
        missing = {"kind", "mean|g|", "mean|h|", "act", "frozen", "reset", "stable", "srank",
                   "eff.rank"}.difference(shown, dropped)  # fmt: skip
        dropped += sorted(missing)
    assert dropped[-3:] == ["stable", "srank", "eff.rank"]
    assert len(dropped) == 9


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_the_legend_states_the_formulas(width):
    output = text(overview.report(REPORT, width, ALL), width)
    assert max(map(len, output.splitlines())) <= width
    words = " ".join(output.split())
    for part in ("exp(-sum p ln p)", "p = s / sum s", "99% of sum s", "sum s^2 / max s^2", "1,024"):
        assert part in words
    none = replace(REPORT, rows=(replace(FIRST, ranks=None),), rank_rows=0)
    assert "srank" not in text(overview.report(none, width, ALL), width)


SMALL = ("test_resnet", "--no-pretrained", "--img-size", "32", "-b", "4", "--batches", "2")


def test_command_line(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    assert main(["profile", *SMALL, "--ranks"]) == 0
    output = capsys.readouterr().out
    title = next(line for line in output.splitlines() if line.startswith("layer "))
    assert title.split()[-3:] == ["eff.rank", "srank", "stable"]
    assert "exp(-sum p ln p)" in output
    assert "--ranks" not in output.partition("next: ")[2]

    def layers(*more):
        assert main(["profile", *SMALL, *more, "--json", "-"]) == 0
        return json.loads(capsys.readouterr().out)["layers"]

    having, without = layers("--ranks"), layers()
    for one, other in zip(having, without, strict=True):
        ranks = one.pop("ranks")
        assert list(ranks) == ["effective_rank", "srank", "stable_rank", "rows", "units"]
        assert ranks["units"] == one["units"]
        assert 0 < ranks["rows"] <= 1024
        assert one == other
    # The sample behind them is the same in every run: the printed numbers can be compared.
    stem = layers("--ranks")[0]["ranks"]
    line = next(line for line in output.splitlines() if line.startswith(having[0]["name"] + " "))
    assert line.split()[-2] == f"{stem['srank']:,}"


def test_command_line_without_ranks(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    assert main(["profile", *SMALL]) == 0
    output = capsys.readouterr().out
    assert "srank" not in output and "eff.rank" not in output
