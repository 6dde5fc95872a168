"""A toy COCO-Stuff: a few small images with labels, in the layouts of the 164k and of the 10k."""

from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

SIZE = (24, 32)
IDS = {"train2017": ("000000000009", "000000000025", "000000000030"), "val2017": ("000000000139", "000000000285")}
IDS_10K = {"train": ("COCO_train2014_000000000077", "COCO_train2014_000000000110"), "test": ("COCO_train2014_000000000349",)}
NEVER = [11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90]


def image_of(rng: np.random.Generator, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(path, quality=95)


def label_of(rng: np.random.Generator) -> np.ndarray:
    """Blocks of classes that occur in COCO-Stuff, and 255."""
    values = np.setdiff1d(np.append(np.arange(182), 255), NEVER).astype(np.uint8)
    return np.kron(rng.choice(values, (6, 8)), np.ones((4, 4), np.uint8))


def make_164k(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, ids in IDS.items():
        (root / "annotations" / split).mkdir(parents=True)
        for id in ids:
            image_of(rng, root / f"images/{split}/{id}.jpg")
            Image.fromarray(label_of(rng)).save(root / f"annotations/{split}/{id}.png")
    return root


def make_10k(root: Path, dtype: type = np.uint16) -> Path:
    rng = np.random.default_rng(1)
    (root / "annotations").mkdir(parents=True)
    (root / "imageLists").mkdir()
    for name, ids in {**IDS_10K, "all": (*IDS_10K["train"], *IDS_10K["test"])}.items():
        (root / f"imageLists/{name}.txt").write_text("".join(f"{id}\n" for id in ids))
        for id in ids if name != "all" else ():
            image_of(rng, root / f"images/{id}.jpg")
            label = label_of(rng).astype(int)
            stored = np.where(label == 255, 0, label + 1)
            savemat(root / f"annotations/{id}.mat", {"S": stored.astype(dtype), "captions": np.array(["a dog"], dtype=object)})
    return root
