"""A control: both policies play the best of 4 samples, chosen by a local critic, which the Gaussian then has as well.

    python benchmark/best_of_k.py --env-id simple_spread_v3 --policy gaussian                 # ddpl_mpe.py
    python benchmark/best_of_k.py --scenario HalfCheetah --agent-conf 2x3 --policy gaussian   # ddpl_mamujoco.py

All flags are those of the script. Averaged weights both policies have by default, so that the Gaussian now differs from
the diffusion policy in its class and how that is learned, and in nothing else. The Gaussian's local critic learns as
the diffusion policy's does, from as many states and candidates, and the Gaussian learns nothing from it.

In evaluations, deterministic means the best of 4 here.
"""

import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import ddpl_mamujoco  # noqa: E402
import ddpl_mpe  # noqa: E402

K = 4


class BestOfK(nn.Module):
    """A policy that plays that of K samples which its agent's local critic values most."""

    def __init__(self, policy: nn.Module, local_critic: nn.Module):
        super().__init__()
        self.policy, self.local_critic, self.mask = policy, local_critic, policy.mask

    @torch.no_grad()
    def sample(self, obs: Tensor, deterministic: bool = False) -> Tensor:
        """Actions [N, B, D] at observations [N, B, O]."""
        samples = self.policy.sample(obs.repeat(1, K, 1)).unflatten(1, (K, -1))  # [N, K, B, D]
        best = self.local_critic(obs, samples).argmax(1)  # [N, B]
        return samples.gather(1, best[:, None, :, None].expand(-1, 1, -1, samples.shape[-1])).squeeze(1)


def controlled(script: ModuleType) -> dict:
    """What takes the place of the script's own functions and classes, by their names."""

    class Learner(script.Learner):
        """With a local critic for the Gaussian, too, which its average policy knows."""

        def __init__(self, args: script.Args, obs_size: int, state_size: int, mask: Tensor, alike: bool):
            super().__init__(args, obs_size, state_size, mask, alike)
            if args.policy == "gaussian":
                other = script.Learner(replace(args, policy="diffusion"), obs_size, state_size, mask, alike)
                self.local_critic, self.local_critic_optimizer = other.local_critic, other.local_critic_optimizer
            object.__setattr__(self.average_policy, "local_critic", self.local_critic)  # no part of it to save

    def update_gaussian(learner: Learner, state: Tensor, obs: Tensor) -> dict[str, Tensor]:
        """The script's own, then the local critic's step of update_diffusion."""
        metrics = own["update_gaussian"](learner, state, obs)
        args, rows = learner.args, slice(learner.args.actor_batch_size)
        state, obs = state[rows], obs[:, rows]
        actions = learner.policy.sample(obs)
        block = script.random_blocks(learner.mask, args.block_size)
        kinds = learner.sigmas, args.num_uniform, args.num_per_kernel
        candidates, _ = script.propose_actions(actions, *kinds, block)
        candidates = candidates + (actions * (1 - block[:, None]))[:, None]
        return metrics | script.update_local_critic(learner, state, obs, actions, candidates)[1]

    def evaluate(policy: nn.Module, args: script.Args, episodes: int, deterministic: bool, *seed_and_video):
        if deterministic:
            policy = BestOfK(policy, policy.local_critic)
        return own["evaluate"](policy, args, episodes, deterministic, *seed_and_video)

    changed = {"Learner": Learner, "update_gaussian": update_gaussian, "evaluate": evaluate}
    own = {name: getattr(script, name) for name in changed}
    return changed


def main(args: ddpl_mpe.Args | ddpl_mamujoco.Args, given: Collection[str] = ()) -> None:
    script = ddpl_mamujoco if isinstance(args, ddpl_mamujoco.Args) else ddpl_mpe
    if args.evaluate is not None:
        raise SystemExit("best_of_k.py: error: --evaluate: a team's file holds no local critic; leave it out")
    if args.num_critics > 0 and args.actor_batch_size % args.num_critics:
        raise SystemExit(
            f"best_of_k.py: error: --actor-batch-size must be a multiple of --num-critics, {args.num_critics}"
        )
    name = f"best_of_k_{script.SCRIPT}"  # the script itself refuses these runs
    vars(script).update(controlled(script) | {"SCRIPT": name})
    script.main(replace(args, exp_name=name) if args.exp_name == type(args).exp_name else args, given)


def read_command_line() -> tuple[ddpl_mpe.Args | ddpl_mamujoco.Args, set[str]]:
    of_a_robot = any(word.split("=")[0] == "--scenario" for word in sys.argv)
    return (ddpl_mamujoco if of_a_robot else ddpl_mpe).read_command_line()


if __name__ == "__main__":
    main(*read_command_line())
