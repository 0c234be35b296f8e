"""How soon policies follow an energy that stands still: new ones, trained against the local critic of a run alone.

    python benchmark/policy_fit.py RUN_DIR    # a diffusion run of ddpl_mpe.py on simple_spread_v3

Prints, after so many updates, the regret of sampled and of deterministic actions: how much less than the best action's,
found on a grid, their value is to the local critic, in temperatures; a mean over agents and 400 states. States are of
the run's replay buffer, the temperature is the run's last one, and the policies are the averages of the weights.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import ddpl_mpe as mpe  # noqa: E402

UPDATES, STATES, SAMPLES, GRID = (1000, 2000, 4000), 400, 64, 61
ROWS = {
    "diffusion, one layer for the observation, 64 states": dict(encoder_layers=1, actor_batch_size=64),
    "diffusion, one layer, 256 states": dict(encoder_layers=1, actor_batch_size=256),
    "diffusion, one layer, 64 states, twice the width": dict(encoder_layers=1, actor_batch_size=64, actor_hidden=256),
    "diffusion, two layers, 64 states": dict(encoder_layers=2, actor_batch_size=64),
    "diffusion, three layers, 64 states": dict(encoder_layers=3, actor_batch_size=64),
    "diffusion, three layers, 128 states": dict(encoder_layers=3, actor_batch_size=128),
    "Gaussian, one layer, 256 states": dict(policy="gaussian", gaussian_encoder_layers=1),
    "Gaussian, three layers, 256 states": dict(policy="gaussian", gaussian_encoder_layers=3),
}


class SumOfLocal(nn.Module):
    """The local critics in the place of the central ones: every agent's own value counts, and no other."""

    def __init__(self, local_critic: mpe.LocalCritic):
        super().__init__()
        self.local_critic = local_critic

    def forward(self, state: Tensor, actions: Tensor) -> Tensor:
        """Values [1, B] at states [B, N * O] of joint actions [N, B, D]."""
        obs = state.unflatten(1, (len(actions), -1)).transpose(0, 1)
        return self.local_critic(obs, actions[:, None]).sum(0)


def stand_still(local_critic: mpe.LocalCritic) -> None:
    """Let ISSM's local critic be this one, which does not learn, and temperatures stay as they are."""

    @torch.no_grad()
    def update_local_critic(learner: mpe.Learner, state: Tensor, obs: Tensor, actions: Tensor, candidates: Tensor):
        return local_critic(obs, candidates), {}

    mpe.update_local_critic = update_local_critic
    mpe.update_temperature = lambda learner, excess: {}


@torch.no_grad()
def regrets(policy: nn.Module, local_critic: mpe.LocalCritic, obs: Tensor, temperature: Tensor) -> tuple[float, float]:
    """Of sampled and of deterministic actions at obs [N, B, O], in temperatures [N]."""
    best = local_critic(obs, grid(*obs.shape[:2])).amax(1)  # [N, B]
    samples = policy.sample(obs.repeat(1, SAMPLES, 1)).unflatten(1, (SAMPLES, -1))  # [N, SAMPLES, B, D]
    values = local_critic(obs, samples).mean(1), local_critic(obs, policy.sample(obs, True)[:, None])[:, 0]
    return tuple(((best - value) / temperature[:, None]).mean().item() for value in values)


def grid(num_agents: int, num_states: int) -> Tensor:
    """Two-dimensional actions [N, GRID^2, B, 2], the same for all agents and states."""
    line = torch.linspace(-1, 1, GRID)
    return torch.cartesian_prod(line, line)[None, :, None].repeat(num_agents, 1, num_states, 1)


def row(name: str, options: dict, run: mpe.Learner, buffer: Tensor) -> str:
    """Regrets of new policies of these options; `buffer` [size, N, O] holds the states."""
    torch.manual_seed(1)
    args = replace(run.args, entities=False, **options)  # the layers compared are those for a whole observation
    learner = mpe.Learner(args, buffer.shape[2], buffer[0].numel(), run.mask, alike=True)
    learner.log_temperature.data.copy_(run.log_temperature)
    learner.critic = SumOfLocal(run.local_critic)
    temperature, held = run.log_temperature.detach().exp(), buffer[:: len(buffer) // STATES][:STATES].transpose(0, 1)
    cells = []
    for update in range(1, UPDATES[-1] + 1):
        size = args.actor_batch_size if args.policy == "diffusion" else args.batch_size
        obs = buffer[torch.randint(len(buffer), (size,))].transpose(0, 1)
        state = obs.transpose(0, 1).flatten(1)
        if args.policy == "gaussian":
            mpe.update_gaussian(learner, state, obs)
        else:
            mpe.update_diffusion(learner, state, obs, learner.policy.sample(obs))
        mpe.step_towards(learner.average_policy, learner.policy, 1 - args.average_decay)
        if update in UPDATES:
            cells.append("{:.1f}, {:.1f}".format(*regrets(learner.average_policy, run.local_critic, held, temperature)))
    return f"| {name} | {' | '.join(cells)} |"


def load(folder: str) -> tuple[mpe.Learner, Tensor]:
    """What a run has learned, and its observations [size, N, O]. Raises RunError for what is no diffusion run here."""
    run_dir = mpe.existing_run("RUN_DIR", folder)
    asked = mpe.Args(env_id="simple_spread_v3", policy="diffusion")
    args, checkpoint = mpe.load_checkpoint("RUN_DIR", run_dir, asked, ("env_id", "policy"), ())
    env = mpe.VectorMPE(args.env_id, args.num_agents, 1)
    learner = mpe.Learner(args, env.obs_size, env.state_size, env.action_mask(), env.alike)
    learner.load_state_dict(checkpoint["learner"])
    learner.local_critic.requires_grad_(False)
    return learner, checkpoint["buffer"]["data"][0]


def main(folder: str) -> None:
    try:
        run, buffer = load(folder)
    except mpe.RunError as error:
        raise SystemExit(f"policy_fit.py: error: {error}") from None
    stand_still(run.local_critic)
    columns = "regret, sampled and deterministic, after", *(f"{update:,} updates" for update in UPDATES)
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name, options in ROWS.items():
        print(row(name, options, run, buffer), flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("policy_fit.py: error: give the folder of one run")
    main(sys.argv[1])
