"""models.py: sizes, any input, the one inference path, checkpoints whole or refused."""
import hashlib
import inspect
import io
import os
import pickle
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, STUDENT, Bomb, no_room, one_line, python

import augment
import data_prep
import models
from models import CheckpointError, UNet, count_parameters, load_model, save_checkpoint, segment_volume, standardize


@pytest.fixture
def net():
    torch.manual_seed(0)
    return UNet(3, 4).eval()


def test_parameter_counts():
    with torch.device("meta"):
        teacher, student = count_parameters(UNet(6, 64)), count_parameters(UNet(4, 16))
    assert round(teacher / 1e6, 1) == 124.4
    assert round(student / 1e6, 4) == 0.4825
    assert round(teacher / student, 1) == 257.8


def test_the_card_tells_of_the_shipped_student():
    card = STUDENT.with_suffix(".md").read_text(encoding="utf-8")
    assert hashlib.sha256(STUDENT.read_bytes()).hexdigest() in card
    assert f"{count_parameters(load_model(STUDENT)[0]):,} parameters" in card


def test_macs_by_hand():
    # [2, 1] at 4 x 4: 16 pixels of 9 + 9; 4 of 2 * 9 + 4 * 9; up 4 * 4 * 2; merge 16 of 2 * 9 + 9; head 16 * 4
    assert models.count_macs(UNet(2, 1), 4) == 16 * 18 + 4 * 54 + 32 + 16 * 27 + 64


@pytest.mark.parametrize("shape", [(1, 1), (17, 31), (64, 63), (16, 16)])
def test_any_input_size(net, shape):
    assert net(torch.randn(2, 1, *shape)).shape == (2, 4, *shape)


def test_padding_leaves_divisible_inputs_alone(net):
    """A padded input's logits equal those of the input padded by hand."""
    x = torch.randn(1, 1, 18, 21)
    by_hand = net(F.pad(x, (0, 3, 0, 2), mode="replicate"))
    torch.testing.assert_close(net(x), by_hand[..., :18, :21])


def test_gradient_reaches_every_parameter(net):
    net(torch.randn(2, 1, 16, 16)).square().sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name


def test_standardize():
    x = standardize(torch.tensor([[[[1.0, 3.0]]], [[[5.0, 5.0]]]]))
    torch.testing.assert_close(x, torch.tensor([[[[-1.0, 1.0]]], [[[0.0, 0.0]]]]))


def noise(shape, seed=0):
    """float32 between 0 and 1, which it reaches both."""
    volume = np.random.default_rng(seed).random(shape).astype(np.float32)
    return (volume - volume.min()) / (volume.max() - volume.min())


def test_segment_volume_whole_returns_to_the_native_grid(net):
    volume = noise((2, 30, 20))
    _, probs = segment_volume(net, volume, size=16, view="whole", return_probs=True)
    small = F.interpolate(torch.from_numpy(volume)[:, None], (16, 16), mode="bilinear", antialias=True)
    expected = F.interpolate(net(standardize(small)), (30, 20), mode="bilinear").softmax(1)
    np.testing.assert_allclose(probs, expected.detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("view", ["heart", "whole"])
def test_segment_volume_batch_scale_and_mode_do_not_matter(net, view):
    volume = np.random.default_rng(1).random((5, 21, 33))
    one = segment_volume(net, volume, size=16, view=view, batch=1)
    net.train()
    other = segment_volume(net, (1000 * volume).astype(np.float64) + 7, size=16, view=view, batch=4)
    assert net.training
    assert (one == other).mean() > 0.999
    assert one.dtype == np.uint8
    assert one.shape == volume.shape


def test_segment_volume_center_and_zoom_by_hand(net):
    """The window moves with the centre, stops at the border, spans size / zoom pixels and is resampled to size."""
    volume = noise((2, 40, 30))
    x = torch.from_numpy(volume)[:, None]
    for center, zoom, (top, left, h, w), grid in (
            (None, (1, 1), (12, 7, 16, 16), None),
            ((12, 20), (1, 1), (4, 12, 16, 16), None), ((39, -3), (1, 1), (24, 0, 16, 16), None),
            ((20, 15), (2, 1), (16, 7, 8, 16), (16, 16)), (None, (0.5, 0.5), (4, 0, 32, 30), (16, 15))):
        labels, probs = segment_volume(net, volume, size=16, center=center, zoom=zoom, return_probs=True)
        window = x[..., top:top + h, left:left + w]
        window = window if grid is None else F.interpolate(window, grid, mode="bilinear", antialias=True)
        logits = net(standardize(window)).detach()
        logits = logits if grid is None else F.interpolate(logits, (h, w), mode="bilinear")
        expected = np.zeros((2, 4, 40, 30), np.float32)
        expected[:, 0] = 1
        expected[:, :, top:top + h, left:left + w] = logits.softmax(1).numpy()
        np.testing.assert_allclose(probs, expected, atol=1e-5)
        np.testing.assert_array_equal(labels, probs.argmax(1))


def test_segment_volume_takes_any_real_dtype(net):
    volume = np.random.default_rng(3).integers(0, 200, (2, 20, 20))
    expected = segment_volume(net, volume, size=16)
    for dtype in (np.uint8, np.uint16, ">i2", ">f4", np.float64, np.int64):
        np.testing.assert_array_equal(segment_volume(net, volume.astype(dtype), size=16), expected)
    np.testing.assert_array_equal(segment_volume(net, torch.from_numpy(volume).bfloat16(), size=16), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        segment_volume(net, np.where(volume > 150, 3e38, volume), size=16)                  # a fill at fp32's end


def test_find_heart_by_hand(monkeypatch, net):
    """The middle of the largest connected thing, whatever smaller ones say; nothing found: no centre."""
    asked, seen = [], np.zeros((3, 40, 50), np.uint8)

    def segment(net, volume, size, view, batch, zoom):
        asked.append((size > 10**6, zoom))
        return seen
    monkeypatch.setattr(models, "segment_volume", segment)
    arguments = (net, seen, (10, 0.7, 2.8), 16)
    assert models.find_heart(*arguments) == {"center": None, "zoom": (0.5, 2.0)}
    seen[1, 10:14, 20:26], seen[1, 12, 22], seen[:, 30, 40:45] = 1, 3, 2       # 24 pixels of two classes; 15
    assert models.find_heart(*arguments) == {"center": (12, 23), "zoom": (0.5, 2.0)}
    assert asked == [(True, (0.5, 2.0))] * 2
    assert models.find_heart(net, seen, None, 16)["zoom"] == (1, 1)
    assert models.find_heart(net, seen, np.array((10, 0.7, 2.8)), 16)["zoom"] == (0.5, 2.0)
    assert models.find_heart(net, seen, (10, 500, 500), 16)["zoom"] == (1024 / 40, 1024 / 50)       # a slip of the pen
    assert models.find_heart(*arguments, "whole") == {}


def test_a_device_that_torch_cannot_use_is_named(monkeypatch):
    """As with a driver that is too old, or a card that torch was not built for: counted, and then it fails."""
    def fail(*args, **kwargs):
        raise RuntimeError("CUDA error: no kernel image is available")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "ones", fail)
    with pytest.raises(models.DeviceError, match=r"--gpu 0: torch .* cannot use it .*no kernel image.*--cpu"):
        models.pick_device()
    assert models.pick_device(None, True) == torch.device("cpu")


@pytest.mark.parametrize(("idle", "number", "env", "expected", "told"), [
    (2.0, None, None, 2, False), (1.2, None, None, 1, True), (0.0, None, None, 1, True), (9.0, None, None, 2, False),
    (float("inf"), None, None, 2, False), (0.0, 3, None, 3, False), (0.0, 1, None, 1, False), (0.0, 3, "2", 2, False)])
def test_choose_threads(monkeypatch, capsys, idle, number, env, expected, told):
    """A machine whose torch would take two threads: what other work leaves, a resumed run's, the user's."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if env:
        monkeypatch.setenv("OMP_NUM_THREADS", env)
    monkeypatch.setattr(models, "idle_cores", lambda: idle)
    torch.set_num_threads(2)
    try:
        models.pick_device(cpu=True, threads=number)
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
    assert ("threads: 1 of 2" in capsys.readouterr().err) == told


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc")
def test_idle_cores_tells_a_busy_machine(monkeypatch):
    assert 0 <= models.idle_cores(0.05) <= os.cpu_count()
    lines = iter(["cpu  100 0 0 100 0 0\n", "cpu  130 0 10 150 10 0\n"])                   # 60 of 100 ticks idle
    monkeypatch.setattr("builtins.open", lambda path: io.StringIO(next(lines)))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert models.idle_cores(0) == pytest.approx(2.4)
    monkeypatch.setattr("builtins.open", lambda path: io.StringIO("cpu  0 0 0 0 0 0\n"))             # a sandbox
    assert models.idle_cores(0) == float("inf")


def test_a_file_that_cannot_be_read_is_not_called_damaged(net, tmp_path, monkeypatch):
    """Or load_last would set a good last.pt aside."""
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")
    for name in ("last.pt", "previous.pt"):
        save_checkpoint(tmp_path / name, content(net))
    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(OSError, match=r"last.pt: cannot be read; give yourself"):
        models.load_last(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pt", "previous.pt"]


def test_a_place_that_takes_no_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/x.pt: cannot be written"):
        save_checkpoint(tmp_path / "file" / "x.pt", {})


@pytest.mark.parametrize(("text", "expected"), [("150000 100000\n", 1.5), ("max 100000\n", float("inf"))])
def test_a_container_s_limit(monkeypatch, text, expected):
    monkeypatch.setattr(models.Path, "read_text", lambda path: text)
    assert models.cpu_limit() == expected
    monkeypatch.setattr(models.Path, "read_text", no_room)
    assert models.cpu_limit() == float("inf")


def test_pick_device(monkeypatch):
    monkeypatch.setattr(torch, "ones", lambda *size, device: torch.zeros(size))
    for count, gpu, cpu, expected in ((0, None, False, "cpu"), (2, None, False, "cuda:0"), (2, 1, False, "cuda:1"),
                                      (2, None, True, "cpu")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda n=count: n)
        assert models.pick_device(gpu, cpu) == torch.device(expected)
    for count, text in ((2, "devices 0 to 1"), (0, re.escape(f"no CUDA device for torch {torch.__version__};"))):
        monkeypatch.setattr(torch.cuda, "device_count", lambda n=count: n)
        with pytest.raises(models.DeviceError, match=f"--gpu 3: this machine has {text}"):
            models.pick_device(3)


def test_segment_volume_refuses(net):
    with pytest.raises(ValueError, match="Z, Y, X"):
        segment_volume(net, np.zeros((4, 4)), size=16)
    with pytest.raises(ValueError, match="NaN"):
        segment_volume(net, np.full((1, 4, 4), np.nan), size=16)
    assert segment_volume(net, np.zeros((1, 4, 4)), size=16).shape == (1, 4, 4)          # constant: no division by 0


def content(net, **changes):
    return {"networks": {"student": net.state_dict()}, "architecture": net.architecture, "better": "student",
            "inference": {"view": "heart", "size": 16}, **changes}


def test_checkpoint_round_trip(net, tmp_path):
    save_checkpoint(tmp_path / "best.pt", content(net))
    loaded, checkpoint = load_model(tmp_path / "best.pt")
    x = torch.randn(1, 1, 16, 16)
    torch.testing.assert_close(loaded(x), net(x))
    assert checkpoint["inference"] == {"view": "heart", "size": 16}
    assert not loaded.training
    assert os.listdir(tmp_path) == ["best.pt"]


def test_failed_save_keeps_the_old_file(net, tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "best.pt", content(net))
    before = (tmp_path / "best.pt").read_bytes()
    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path / "best.pt", content(UNet(2, 2)))
    assert (tmp_path / "best.pt").read_bytes() == before
    assert os.listdir(tmp_path) == ["best.pt"]


def test_bad_checkpoints_get_one_line(net, tmp_path):
    save_checkpoint(tmp_path / "good.pt", content(net))
    whole = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "truncated.pt").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save({"weights": 1}, tmp_path / "foreign.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "bomb.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    torch.save({"x": Bomb(tmp_path / "executed")}, tmp_path / "bomb2.pt")
    save_checkpoint(tmp_path / "widths.pt", content(net, architecture={**net.architecture, "base": 8}))
    save_checkpoint(tmp_path / "less.pt", {"networks": {}})
    nan = {k: v * np.nan if v.is_floating_point() else v for k, v in net.state_dict().items()}
    save_checkpoint(tmp_path / "nan.pt", content(net, networks={"student": nan}))
    save_checkpoint(tmp_path / "inference.pt", content(net, inference={}))
    save_checkpoint(tmp_path / "view.pt", content(net, inference={"size": 16, "view": "sideways"}))
    bad = sorted(tmp_path.glob("*.pt"))
    assert len(bad) == 13
    for path in [*bad, tmp_path / "absent.pt", tmp_path]:
        if path.name != "good.pt":
            with pytest.raises(CheckpointError) as error:
                load_model(path)
            one_line(str(error.value), path)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(CheckpointError, match="coteacher"):
        load_model(tmp_path / "good.pt", which="coteacher")
    assert models.load_checkpoint(tmp_path / "good.pt")["better"] == "student"


@pytest.mark.parametrize(("name", "code", "said"), [
    ("models", "net = models.UNet(4, 16); print(models.segment_volume(net, np.random.rand(2, 40, 30), 32).shape, "
               "models.count_parameters(net))", "(2, 40, 30) 482500"),
    ("augment", "rng, noise, x = np.random.default_rng(0), torch.Generator(), torch.rand(2, 1, 40, 40); "
                "x = augment.warp(x, augment.heart_window(2, 16, 40, rng, x.device)); "
                "print(*augment.perturb(x, rng, noise, 1.0).shape)", "2 1 16 16")])
def test_copied_alone(tmp_path, name, code, said):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    result = python("-c", f"import numpy as np, torch, {name}; {code}", cwd=tmp_path)
    assert result.stdout.strip() == said, result.stderr


def test_files_that_are_copied_alone_standardise_alike():
    assert inspect.getsource(models.standardize) == inspect.getsource(augment.standardize)
    assert inspect.getsource(models.one_line) == inspect.getsource(data_prep.one_line)
