"""What the adapters share."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from small_network import IMAGES
from torch.utils.data import DataLoader, TensorDataset

from stp_fx.errors import InputError
from stp_fx.integrations._common import LateBatches, own_random_numbers


def test_reading_shuffled_data_leaves_the_random_numbers_of_training_alone() -> None:
    data = LateBatches(lambda: DataLoader(TensorDataset(IMAGES), batch_size=8, shuffle=True))

    def draw() -> tuple[float, float, float]:
        return torch.rand(()).item(), random.random(), np.random.rand()

    def seed_all(seed: int) -> None:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)

    read = []
    for seed in (0, 1):
        seed_all(seed)
        expected = draw()
        seed_all(seed)
        with own_random_numbers(3):
            read.append(torch.cat([batch for (batch,) in data]))
            inside = draw()
        assert draw() == expected != inside
    assert torch.equal(*read)
    assert not torch.equal(read[0], IMAGES)


def test_persistent_workers_keep_their_epoch() -> None:
    loader = DataLoader(TensorDataset(IMAGES), batch_size=8, num_workers=1, persistent_workers=True)
    epoch = iter(loader)
    next(epoch)
    batches = LateBatches(lambda: loader)
    assert len(list(batches)) == len(batches) == 3
    assert len(list(epoch)) == 2


def test_no_data() -> None:
    with pytest.raises(InputError, match="train_loader"):
        list(LateBatches(lambda: None))


@pytest.mark.slow
def test_no_other_library_is_imported_before_it_is_asked_for() -> None:
    program = (
        "import sys, stp_fx, stp_fx.integrations\n"
        "print(*{'lightning', 'pytorch_lightning', 'transformers', 'accelerate'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "")
