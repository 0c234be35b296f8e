"""The package's own IPPO on SMAX, for scale: recurrent, discrete actions, the settings of its configuration file.

    git clone https://github.com/FLAIROx/JaxMARL && git -C JaxMARL checkout c793d095
    pip install distrax hydra-core wandb
    python benchmark/ddpl_smax_jax_ippo.py JaxMARL 3m 2s3z 5m_vs_6m

Writes benchmark/results/smax/ippo.csv: win rate and return of the battles that end between two updates (sampled
actions), three seeds a map. It sees what our scripts see, but its actions, and how often it acts, are not ours.
And ippo_final.csv: what the final policies win (sampled) with their own actions, and when each of their choices is
carried out by the continuous action that comes closest to it. The difference is what the continuous actions cost.
"""

import csv
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import yaml
from jax import Array
from jax import numpy as jnp
from jaxmarl.environments.smax import HeuristicEnemySMAX, map_name_to_scenario

sys.path.insert(0, str(Path(__file__).parent.parent))
import ddpl_smax_jax as smax  # noqa: E402

TOTAL_TIMESTEPS, NUM_ENVS, SEEDS = 2_000_000, 32, (1, 2, 3)
BATTLES = 256
RESULTS = Path(__file__).parent / "results" / "smax"


def translated(env: HeuristicEnemySMAX, env_state: Any, choices: Array) -> Array:
    """Continuous actions [N, 4] in [0, 1], as the environment takes them, that come closest to discrete choices [N].

    Walking and stopping are matched exactly. Of aims straight at the target and all around, each at most one length
    away, it takes the one that the target is nearest to, compared with the others in range; the last target is shot at
    again without aiming.
    """
    state, allies = env_state.state, env.num_agents
    walk = env._decode_discrete_actions(choices)[0]  # [N, 2], 0 for stopping and shooting
    target = choices - env.num_movement_actions
    shoots, own = target >= 0, state.unit_positions[:allies]
    away = state.unit_positions[None, allies:] - own[:, None]  # [N, E, 2]
    straight = jnp.take_along_axis(away, target.clip(0)[:, None, None], axis=1)  # [N, 1, 2]
    straight = straight / jnp.linalg.norm(straight, axis=-1, keepdims=True).clip(1)
    angles = 2 * jnp.pi * jnp.arange(64) / 64
    around = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    aims = jnp.concatenate([straight, jnp.tile(around, (allies, 1, 1))], axis=1)  # [N, 65, 2]
    gaps = jnp.linalg.norm(away[:, None] - aims[:, :, None], axis=-1)  # [N, 65, E]
    chosen = (jnp.arange(env.num_enemies) == target[:, None])[:, None]  # [N, 1, E]
    available = env.get_avail_actions(env_state)
    in_range = jnp.stack([available[agent] for agent in env.agents])[:, env.num_movement_actions :] > 0
    others = jnp.where(chosen | ~in_range[:, None], jnp.inf, gaps).min(-1)
    best = (jnp.where(chosen, gaps, 0).sum(-1) - others).argmin(-1)
    x, y = jnp.where(shoots, aims[jnp.arange(allies), best].T, walk.T)
    again = shoots & (state.prev_attack_actions[:allies] == choices)
    return jnp.stack([1.0 - again, 1.0 - shoots, (x + 1) / 2, (y + 1) / 2], axis=-1)


def win_rates(ippo: ModuleType, config: dict, params: Any) -> dict[str, float]:
    """What a policy wins with its own actions and with `translated` ones, in BATTLES battles each."""
    own = HeuristicEnemySMAX(scenario=map_name_to_scenario(config["MAP_NAME"]), **config["ENV_KWARGS"])
    continuous = smax.make_env(smax.Args(map_name=config["MAP_NAME"]))
    network = ippo.ActorCriticRNN(own.action_space(own.agents[0]).n, config=config)

    def together(values: dict[str, Array]) -> Array:
        return jnp.stack([values[agent] for agent in own.agents])

    def won(translate: bool, key: Array) -> Array:
        def step(carry: tuple, key: Array) -> tuple[tuple, None]:
            env_state, obs, dead, memory, playing, won = carry
            act_key, step_key = jax.random.split(key)
            seen = obs[None], dead[None], together(own.get_avail_actions(env_state))
            memory, choice, _ = network.apply(params, memory, seen)
            actions, env = choice.sample(seed=act_key)[0], own
            if translate:
                actions, env = translated(continuous, env_state, actions), continuous
            named = dict(zip(env.agents, actions))
            observations, env_state, _, dones, _ = env.step_env(step_key, env_state, named)
            alive = env_state.state.unit_alive
            victory = alive[: env.num_agents].any() & ~alive[env.num_agents :].any()
            won, playing = won | (playing & victory), playing & ~dones["__all__"]
            return (env_state, together(observations), together(dones), memory, playing, won), None

        reset_key, key = jax.random.split(key)
        observations, env_state = own.reset(reset_key)
        env_state = jax.tree.map(lambda leaf: leaf.astype(leaf.dtype), env_state)
        memory = ippo.ScannedRNN.initialize_carry(own.num_agents, config["GRU_HIDDEN_DIM"])
        start = env_state, together(observations), jnp.zeros(own.num_agents, bool), memory, jnp.array(True), False
        return jax.lax.scan(step, start, jax.random.split(key, own.max_steps + 1))[0][-1]

    keys = jax.random.split(jax.random.PRNGKey(0), BATTLES)
    names = {"discrete": False, "translated": True}
    return {name: round(float(jax.jit(jax.vmap(partial(won, how)))(keys).mean()), 3) for name, how in names.items()}


def write(name: str, rows: list[dict]) -> None:
    with open(RESULTS / name, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    folder = Path(sys.argv[1]) / "baselines" / "IPPO"
    sys.path.insert(0, str(folder))
    import ippo_rnn_smax

    rows, final, points = [], [], []
    ippo_rnn_smax.wandb = SimpleNamespace(log=points.append)  # where its curves go
    settings = yaml.safe_load((folder / "config" / "ippo_rnn_smax.yaml").read_text())
    for map_name in sys.argv[2:]:
        for seed in SEEDS:
            points.clear()
            config = settings | {"MAP_NAME": map_name, "TOTAL_TIMESTEPS": TOTAL_TIMESTEPS, "NUM_ENVS": NUM_ENVS}
            trained = jax.jit(ippo_rnn_smax.make_train(config))(jax.random.PRNGKey(seed))
            jax.block_until_ready(trained)
            of = {"map": map_name, "seed": seed}
            for point in sorted(points, key=lambda point: point["env_step"]):
                row = of | {"global_step": int(point["env_step"])}
                rows.append(row | {name: round(float(point[name]), 4) for name in ("win_rate", "returns")})
            params = trained["runner_state"][0][0].params
            final.append(of | win_rates(ippo_rnn_smax, config, params))
            print(final[-1], flush=True)
            write("ippo.csv", rows)
            write("ippo_final.csv", final)


if __name__ == "__main__":
    main()
