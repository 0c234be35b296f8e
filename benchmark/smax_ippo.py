"""The package's own IPPO on SMAX, for scale: recurrent, discrete actions, the settings of its configuration file.

    git clone https://github.com/FLAIROx/JaxMARL && git -C JaxMARL checkout c793d095
    pip install distrax hydra-core wandb
    python benchmark/smax_ippo.py JaxMARL 3m 2s3z 5m_vs_6m

Writes benchmark/results/smax/ippo.csv: win rate and return of the battles that end between two updates (sampled
actions), three seeds a map. It sees what our scripts see, but its actions, and how often it acts, are not ours.
"""

import csv
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import yaml

TOTAL_TIMESTEPS, NUM_ENVS, SEEDS = 2_000_000, 32, (1, 2, 3)
RESULTS = Path(__file__).parent / "results" / "smax" / "ippo.csv"


def main() -> None:
    folder = Path(sys.argv[1]) / "baselines" / "IPPO"
    sys.path.insert(0, str(folder))
    import ippo_rnn_smax

    rows, points = [], []
    ippo_rnn_smax.wandb = SimpleNamespace(log=points.append)  # where its curves go
    settings = yaml.safe_load((folder / "config" / "ippo_rnn_smax.yaml").read_text())
    for map_name in sys.argv[2:]:
        for seed in SEEDS:
            points.clear()
            config = settings | {"MAP_NAME": map_name, "TOTAL_TIMESTEPS": TOTAL_TIMESTEPS, "NUM_ENVS": NUM_ENVS}
            jax.block_until_ready(jax.jit(ippo_rnn_smax.make_train(config))(jax.random.PRNGKey(seed)))
            for point in sorted(points, key=lambda point: point["env_step"]):
                row = {"map": map_name, "seed": seed, "global_step": int(point["env_step"])}
                rows.append(row | {name: round(float(point[name]), 4) for name in ("win_rate", "returns")})
            print(rows[-1])
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
