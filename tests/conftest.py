import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # the scripts stand at the root

# JAX then compiles in a third of the time. XLA reads its flags once, when JAX is imported.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"


@pytest.fixture(autouse=True)
def reproducible(tmp_path, monkeypatch):
    """Every test starts from the same random numbers and in an empty folder, where its runs/ go."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.set_num_threads(1)
