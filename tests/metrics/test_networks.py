"""Networks: preprocessing by hand, missing, damaged and wrong weights, and sharing."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.functional.image.lpips import _LPIPS
from torchmetrics.image.fid import NoTrainInceptionV3
from torchvision.models import squeezenet1_1

from nemo_bench.errors import ConfigError, ModelError
from nemo_bench.metrics import LPIPS, SSCD, Inception, Network, OpenClip, networks
from small_networks import descriptor, picture, sscd

CPU = torch.device("cpu")
MEAN, DEVIATION = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def crop(image: Image.Image, side: int) -> Image.Image:
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    return image.crop((left, top, left + side, top + side))


def prepared(image: Image.Image, protocol: str) -> NDArray[np.float64]:
    """What a published script does to a picture, by PIL and numpy."""
    bilinear = Image.Resampling.BILINEAR
    if protocol == "disc_large_wen":
        short = min(image.size)
        sized = crop(image.resize((image.width * 256 // short, image.height * 256 // short), bilinear), 224)
        return (np.asarray(sized) / 255 - 0.5) / 0.5
    side = 320 if protocol == "disc_mixup" else 288
    return (np.asarray(image.resize((side, side), bilinear)) / 255 - MEAN) / DEVIATION


@pytest.mark.parametrize(
    ("protocol", "dimensions"), [("disc_mixup", 512), ("disc_large_wen", 1024), ("disc_large_membench", 1024)]
)
def test_sscd_prepares_pictures_as_its_protocol_says(tmp_path: Path, protocol: str, dimensions: int) -> None:
    path, module = descriptor(tmp_path, dimensions)
    space = SSCD(str(path), protocol)  # type: ignore[arg-type]
    space.check()
    images = [picture(1), picture(2, (512, 512)), picture(3, (256, 257))]
    pixels = [torch.from_numpy(prepared(image, protocol)).permute(2, 0, 1).float() for image in images]
    with torch.no_grad():
        expected = module(torch.stack(pixels))
    vectors = space.embed(images, (64, 64), CPU)
    torch.testing.assert_close(vectors, expected, atol=1e-4, rtol=1e-4)
    unit = vectors.numpy() / np.linalg.norm(vectors.numpy(), axis=1, keepdims=True)
    assert space.compare(vectors, vectors).numpy() == pytest.approx(unit @ unit.T, abs=1e-5)
    assert space.pair(vectors[:2], vectors[1:]).numpy() == pytest.approx((unit[:2] * unit[1:]).sum(1), abs=1e-5)


def test_sscd_of_another_network_is_refused(tmp_path: Path) -> None:
    path = str(descriptor(tmp_path, 1024)[0])
    wrong = SSCD(path, "disc_mixup")
    for use in (wrong.check, lambda: wrong.embed([picture(0)], (64, 64), CPU)):
        with pytest.raises(ModelError, match=r"SSCD disc_mixup: .* gives 1024 values a picture, expected 512"):
            use()
    SSCD(path, "disc_large_wen").check()
    names = {SSCD(path, protocol).title for protocol in ("disc_mixup", "disc_large_wen", "disc_large_membench")}
    assert len(names) == 3


def test_sscd_without_its_file_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no file is given. Download https://.*/sscd_disc_mixup.torchscript.pt"):
        SSCD().check()
    with pytest.raises(ModelError, match=r"gone.pt' does not exist. Download https://.*/sscd_disc_large.torchscript"):
        SSCD(str(tmp_path / "gone.pt"), "disc_large_wen").check()
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"no script")
    with pytest.raises(ModelError, match="no TorchScript file of SSCD"):
        SSCD(str(broken)).embed([picture(0)], (64, 64), CPU)


def test_a_file_with_another_digest_is_refused(tmp_path: Path) -> None:
    path, _ = descriptor(tmp_path, 512)
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    SSCD(str(path), sha256=right).check()
    SSCD(str(path), sha256=right[:8].upper()).check()
    with pytest.raises(ModelError, match=f"has SHA-256 {right}, expected 00ff"):
        SSCD(str(path), sha256="00ff").check()
    moved = path.rename(tmp_path / "moved.pt")
    assert SSCD(str(moved)).fingerprint()["file"] == right


def test_equal_spaces_share_their_network(tmp_path: Path) -> None:
    first, second = sscd(tmp_path), SSCD(file=str(tmp_path / "descriptor512.pt"))
    assert networks.loaded(first, CPU) is networks.loaded(second, CPU)
    assert first.view == second.view
    assert first.view != SSCD(first.file, "disc_large_wen").view


def test_many_pictures_are_embedded_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space, images = sscd(tmp_path), [picture(seed, (40, 40)) for seed in range(5)]
    whole = space.embed(images, (64, 64), CPU)
    monkeypatch.setattr(networks, "BATCH", 2)
    torch.testing.assert_close(space.embed(images, (64, 64), CPU), whole, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: {}, raising=False
        )
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *a, **k: None)
        weights = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).state_dict()
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(weights, path)
    return path


def test_inception_embeds_as_torchmetrics_does(inception: Path) -> None:
    space = Inception(str(inception))
    space.check()
    images = [picture(1, (70, 64)), picture(2, (128, 128)), picture(3, (70, 64))]
    library = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(inception))
    vectors = space.embed(images, (64, 64), CPU)
    assert vectors.shape == (3, 2048)
    for image, vector in zip(images, vectors, strict=True):
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None]
        torch.testing.assert_close(vector, library(pixels)[0], atol=1e-5, rtol=1e-5)


def test_inception_without_weights_or_library_says_how_to_get_them(
    inception: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match=r"no weights for Inception.*weights-inception-2015-12-05-6726825d.pth once"):
        Inception("nowhere.pth").check()
    monkeypatch.setattr(networks, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'nemo-bench\[fid\]'"):
        Inception(str(inception)).check()


def damaged(path: Path) -> Iterator[Path]:
    """A file cut off, altered in the middle, and replaced by a page that says that it is gone."""
    content = path.read_bytes()
    middle = len(content) // 2
    altered = content[:middle] + bytes(255 - byte for byte in content[middle : middle + 64]) + content[middle + 64 :]
    for number, bad in enumerate((content[:middle], altered, b"<html>not found</html>", b"")):
        path.write_bytes(bad)
        os.utime(path, (number, number))
        yield path
    path.write_bytes(content)


def test_damaged_weights_fail_the_check(tmp_path: Path, inception: Path, hub: Path) -> None:
    kept = shutil.copy(inception, tmp_path / "inception.pth")
    torch.save(squeezenet1_1(weights=None).state_dict(), hub / "squeezenet1_1-b8a52dc0.pth")
    descriptor(tmp_path, 512)
    torch.save({"a": torch.rand(4096)}, tmp_path / "clip.pt")
    torch.save({"a": torch.rand(4096)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    spaces: list[tuple[Network | LPIPS, Path]] = [
        (SSCD(str(tmp_path / "descriptor512.pt")), tmp_path / "descriptor512.pt"),
        (Inception(str(kept)), kept),
        (LPIPS("squeeze"), hub / "squeezenet1_1-b8a52dc0.pth"),
        (OpenClip("ViT-B-32-quickgelu", str(tmp_path / "clip.pt")), tmp_path / "clip.pt"),
    ]
    for space, file in spaces:
        space.check()
        for path in damaged(file):
            with pytest.raises(
                ModelError, match=rf"no weights for .*{path.name} can't be read \(.+\); download it again"
            ):
                space.check()
    OpenClip("ViT-B-32-quickgelu", str(tmp_path / "old.pt")).check()
    cut = tmp_path / "old.pt"
    cut.write_bytes(cut.read_bytes()[:-64])
    with pytest.raises(ModelError, match=r"old\.pt can't be read"):
        OpenClip("ViT-B-32-quickgelu", str(cut)).check()


def test_weights_of_another_network_fail_the_check(tmp_path: Path, hub: Path) -> None:
    torch.save({"a": torch.rand(4)}, hub / "squeezenet1_1-b8a52dc0.pth")
    with pytest.raises(ModelError, match="has no weights of LPIPS squeeze"):
        LPIPS("squeeze").check()
    torch.save({"a": torch.rand(4)}, tmp_path / "other.pth")
    with pytest.raises(ModelError, match="has no weights of Inception"):
        Inception(str(tmp_path / "other.pth")).check()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_lpips_without_weights_names_their_place(hub: Path) -> None:
    for net in ("alex", "vgg", "squeeze"):
        with pytest.raises(ModelError, match=rf"no weights for LPIPS {net}: {hub}.*Download https://.*TORCH_HOME"):
            LPIPS(net).check()  # type: ignore[arg-type]


def test_lpips_is_the_weighted_distance_of_unit_features(hub: Path) -> None:
    torch.manual_seed(0)
    torch.save(squeezenet1_1(weights=None).state_dict(), hub / "squeezenet1_1-b8a52dc0.pth")
    space = LPIPS("squeeze")
    space.check()
    a, b = torch.rand(2, 3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    network = networks.loaded(space, CPU)
    assert isinstance(network, _LPIPS)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    expected = torch.zeros(3)
    with torch.no_grad():
        seen = [network.net((2 * x - 1 - shift[:, None, None]) / scale[:, None, None]) for x in (a, b)]
        for one, other, linear in zip(*seen, network.lins, strict=True):
            difference = (F.normalize(one, eps=1e-8) - F.normalize(other, eps=1e-8)).square()
            weights = linear.model[-1].weight[0]
            expected += (difference * weights).sum(1).mean((1, 2))
    torch.testing.assert_close(space.pair(a, b), expected, atol=1e-4, rtol=1e-3)
    assert space.compare(a, b).diagonal().tolist() == pytest.approx(expected.tolist(), rel=1e-3)
    assert space.nearest(a, torch.cat([b, a])).tolist() == pytest.approx([0, 0, 0], abs=1e-5)
