"""Makes the pictures of docs/explorer.md, in docs/pictures: the explorer's page of three networks, as Chromium shows it.

ResNet-18 is pruned; Swin-T and the Llama, which has the widths of Llama-3-70B and 8 layers, are traced on the meta device. Needs
the extras `test` (transformers) and `demo` (Pillow comes with matplotlib), and Chromium.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
import torchvision
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

import stp_fx

SIZE = (1280, 860)
COLOURS = 200
STATES = {
    "resnet18": "theme=light&open=layer2.0&find=layer2.0.conv2.weight:0",
    "swin_t": "theme=dark&open=features.1.0&find=features.1.0.attn.qkv",
    "llama": "theme=light&open=model.layers.0&find=model.layers.0.mlp.down_proj.weight:1[7]",
}
LLAMA = LlamaConfig(
    hidden_size=8192, intermediate_size=28672, num_hidden_layers=8, num_attention_heads=64, num_key_value_heads=8,
    vocab_size=128256, use_cache=False,
)  # fmt: skip


def explorers() -> dict[str, stp_fx.Explorer]:
    torch.manual_seed(0)
    image = torch.zeros(1, 3, 224, 224)
    gm = stp_fx.trace(torchvision.models.resnet18(weights=None).eval(), image)
    pruned = stp_fx.prune_graph(gm, ratio=0.5, target="macs", scope="isomorphic")
    with torch.device("meta"):
        swin, llama = torchvision.models.swin_t(weights=None).eval(), LlamaForCausalLM(LLAMA).eval()
    tokens = torch.zeros(1, 16, dtype=torch.int64, device="meta")
    return {
        "resnet18": stp_fx.explore(gm, pruned=pruned, title="ResNet-18"),
        "swin_t": stp_fx.explore(stp_fx.trace(swin, image.to("meta")), title="Swin-T"),
        "llama": stp_fx.explore(stp_fx.trace(llama, tokens, outputs="logits"), title="Llama-3-70B, 8 layers"),
    }


def screenshot(chromium: str, page: Path, state: str, target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        settings += [f"--user-data-dir={folder}", f"--window-size={SIZE[0]},{SIZE[1]}", "--virtual-time-budget=20000"]
        command = [chromium, *settings, f"--screenshot={target}", f"{page.resolve().as_uri()}#{state}"]
        subprocess.run(command, check=True, capture_output=True)
    with Image.open(target) as picture:
        small = picture.convert("RGB").quantize(COLOURS)
    small.save(target, optimize=True)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("Chromium is not installed: apt-get install chromium")
    with tempfile.TemporaryDirectory() as pages:
        for name, made in explorers().items():
            page = made.save(Path(pages) / f"{name}.html")
            target = folder / f"explorer-{name}.png"
            screenshot(chromium, page, STATES[name], target)
            print(target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "pictures")
    main(parser.parse_args().folder)
