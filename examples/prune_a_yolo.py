"""Train a YOLO on images of digits, take half of its multiply-accumulates out, and go on in the trainer that it came from.

    python examples/prune_a_yolo.py                                    # about half an hour on one thread
    python examples/prune_a_yolo.py --quick                            # a minute, with a network that has learnt little
    python examples/prune_a_yolo.py --model yolo11n --ignore model.10  # attention keeps its size
    python examples/prune_a_yolo.py --weights out/yolo/original/weights/last.pt

The images are scikit-learn's digits on canvases of noise, so nothing is downloaded. Everything it writes goes to ``out/yolo/``.
Needs ``pip install "stp-fx[yolo,demo,ship]"``.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("YOLO_OFFLINE", "true")  # read when ultralytics is imported: no fonts, no weights, no news
os.environ.setdefault("YOLO_AUTOINSTALL", "false")
os.environ.setdefault("YOLO_CONFIG_DIR", str(Path("out/yolo").resolve()))

import torch
from digit_scenes import SIDE, scenes
from rich.console import Console
from rich.table import Table
from torch import nn

Path(os.environ["YOLO_CONFIG_DIR"]).mkdir(parents=True, exist_ok=True)

from ultralytics import RTDETR, YOLO  # noqa: E402 - reads the settings above

import stp_fx  # noqa: E402


def write_data(folder: Path, train: int, val: int) -> Path:
    """Images and labels in the layout that the trainer reads: class, centre, width and height, as fractions of the image."""
    for part, count in (("train", train), ("val", val)):
        for kind in ("images", "labels"):
            (folder / kind / part).mkdir(parents=True, exist_ok=True)
            for old in (folder / kind / part).iterdir():
                old.unlink()
        for k, (image, boxes) in enumerate(scenes(part, count)):
            image.save(folder / "images" / part / f"{k:04}.png")
            lines = [
                f"{label} {(left + side / 2) / SIDE:.5f} {(top + side / 2) / SIDE:.5f} {side / SIDE:.5f} {side / SIDE:.5f}"
                for label, left, top, side in boxes
            ]
            (folder / "labels" / part / f"{k:04}.txt").write_text("\n".join(lines))
    names = "\n".join(f"  {k}: '{k}'" for k in range(10))
    (folder / "data.yaml").write_text(f"path: {folder.resolve()}\ntrain: images/train\nval: images/val\nnames:\n{names}\n")
    return folder / "data.yaml"


def trainer_of(yolo: Any, model: nn.Module) -> type:
    """The trainer of the task, with this network: the original would build one anew from the YAML, at its full width."""

    class Trainer(yolo.task_map[yolo.task]["trainer"]):
        def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
            return model.requires_grad_()  # parameters of a checkpoint are frozen

    return Trainer


def train(yolo: Any, out: Path, name: str, **options: Any) -> None:
    """Runs the trainer; afterwards ``yolo`` holds the best epoch's network, read from its checkpoint."""
    yolo.train(
        imgsz=SIDE, batch=16, device="cpu", workers=0, seed=0, amp=False, plots=False, verbose=False, exist_ok=True,
        project=str(out.resolve()), name=name, optimizer="AdamW", fliplr=0.0, mosaic=0.0, erasing=0.0, **options,
    )  # fmt: skip


def precision(yolo: Any, model: nn.Module, data: Path, out: Path, imgsz: int = SIDE) -> tuple[float, float]:
    """mAP50 and mAP50-95 of a copy of ``model``: a validation folds the norms of its network into the convolutions."""
    held = yolo.model
    try:
        yolo.model = copy.deepcopy(model)
        found = yolo.val(
            data=str(data), imgsz=imgsz, batch=16, device="cpu", workers=0, plots=False, verbose=False,
            project=str(out.resolve()), name="val", exist_ok=True,
        )  # fmt: skip
    finally:
        yolo.model = held
    return found.box.map50, found.box.map


def pruned(model: nn.Module, example: torch.Tensor, ratio: float, ignore: list[str], console: Console) -> nn.Module:
    """A smaller network of the same class.

    ``uniform``: the code of these networks takes outputs apart into equal parts (``chunk``), so that all layers keep the same
    fraction. Attention computes its sizes from each other: ``ignore`` leaves it whole.
    """
    start = time.process_time()
    gm = stp_fx.trace(model, example)
    small = stp_fx.prune_graph(gm, "magnitude", ratio, target="macs", uniform=True, ignore=ignore)
    written = stp_fx.write_back(small, model, example)
    seconds = time.process_time() - start
    before, after = stp_fx.cost(gm), stp_fx.cost(small)
    console.print(f"Pruned to {after.macs / before.macs:.1%} of its MACs, checked and written back, in {seconds:.1f} s")
    return written


def costs(model: nn.Module, example: torch.Tensor) -> tuple[int, int]:
    cost = stp_fx.cost(stp_fx.trace(model, example, validate=False))
    return cost.macs // len(example), sum(p.numel() for p in model.parameters())


def export_and_run(kind: type, path: Path, example: torch.Tensor, console: Console) -> None:
    """The checkpoint, loaded anew, as ONNX at another image size; it gives what PyTorch does."""
    import onnxruntime

    again = kind(path)
    file = again.export(format="onnx", imgsz=example.shape[-1], simplify=False, device="cpu", verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: example[:1].numpy()})
    theirs = torch.from_numpy(found)
    with torch.no_grad():
        ours = kind(path).model.eval()(example[:1])[0]
    if kind is RTDETR:  # boxes by their scores, many of which differ by rounding alone: each is held against the nearest
        theirs = theirs[:, torch.cdist(ours[0], theirs[0], p=torch.inf).argmin(1)]
    error = float((theirs - ours).abs().max() / ours.abs().max())
    console.print(f"ONNX at {example.shape[-1]} px: {file}, off by {error:.1e} of the largest output")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="yolov8n", help="a YAML of ultralytics, without its ending (default: %(default)s)")
    parser.add_argument("--ratio", type=float, default=0.5, help="fraction of the MACs to remove (default: %(default)s)")
    parser.add_argument("--ignore", nargs="*", default=[], help="modules that keep their channels, e.g. model.10")
    parser.add_argument("--weights", type=Path, help="a checkpoint to prune; without it, the original is trained first")
    parser.add_argument("--epochs", type=int, default=20, help="of the original (default: %(default)s)")
    parser.add_argument("--images", type=int, default=400, help="to train on (default: %(default)s)")
    parser.add_argument("--finetune-epochs", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="1 epoch on 32 images")
    parser.add_argument("--out", type=Path, default=Path("out/yolo"), help="folder to write to (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    args, console = arguments(), Console(soft_wrap=True)
    epochs, images = (1, 32) if args.quick else (args.epochs, args.images)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = write_data(args.out / "data", images, max(images // 4, 16))
    example = torch.rand(2, 3, SIDE, SIDE)
    rows: dict[str, list[str]] = {"mAP50": [], "mAP50-95": [], "MACs per image": [], "parameters": []}

    def note(model: nn.Module) -> None:
        values = (*(f"{v:.3f}" for v in precision(yolo, model, data, args.out)), *(f"{v:,}" for v in costs(model, example)))
        for row, value in zip(rows.values(), values):
            row.append(value)

    kind = RTDETR if args.model.startswith("rtdetr") else YOLO
    yolo = kind(args.weights or f"{args.model}.yaml")
    if args.weights is None:
        train(yolo, args.out, "original", data=str(data), epochs=epochs, lr0=2e-3, val=False, pretrained=False)
    note(yolo.model)

    yolo.model = pruned(yolo.model, example, args.ratio, args.ignore, console)
    note(yolo.model)

    trainer = trainer_of(yolo, yolo.model)
    train(yolo, args.out, "pruned", trainer=trainer, data=str(data), epochs=args.finetune_epochs, lr0=1e-3, warmup_epochs=0)
    note(yolo.model)

    table = Table(title=f"{args.model}: {images} images, {epochs} epochs", title_justify="left")
    for column in ("", "before", "right after pruning", f"{args.finetune_epochs} more epochs"):
        table.add_column(column, justify="right" if column else "left")
    for name, values in rows.items():
        table.add_row(name, *values)
    console.print(table)

    best = args.out / "pruned" / "weights" / "best.pt"
    larger = torch.rand(2, 3, 2 * SIDE, 2 * SIDE)
    at_larger = precision(yolo, kind(best).model, data, args.out, imgsz=2 * SIDE)
    console.print(f"Loaded anew from {best}; mAP50 at {2 * SIDE} px: {at_larger[0]:.3f}")
    export_and_run(kind, best, larger, console)


if __name__ == "__main__":
    main()
