"""The pushing task for Gymnasium, which is needed here only: pip install gymnasium.

    import gymnasium, gym_push
    env = gymnasium.make("tecnets/Push-v3", split="train", tasks=1, dense_reward=True)
"""
import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict

import sim


class GymPushEnv(sim.PushEnv, gymnasium.Env):
    """sim.PushEnv, with one of the first `tasks` of a split drawn at every reset.

    Observations do not tell which object is the target, only demonstrations do: with one task it
    is always the same. The options of reset are those of PushEnv. The reward is 1 while the target
    is at the goal or, if dense, minus the distance between them. `info` adds the goal,
    `is_success`, and the poses of target, distractor and fork, each a position (3,) and a
    quaternion (4,) in one array.
    """
    metadata = {"render_modes": ["rgb_array"], "render_fps": sim.CONTROL_HZ}

    def __init__(self, split="train", tasks=1, dense_reward=False, images=True,
                 image_size=sim.IMAGE_SIZE, render_mode=None):
        super().__init__(image_size, images)
        self.split, self.tasks, self.dense_reward = split, tasks, dense_reward
        self.render_mode = render_mode
        self.action_space = Box(-1, 1, (sim.ACTION_DIM,))
        self.observation_space = Dict(state=Box(-np.inf, np.inf, (sim.STATE_DIM,)))
        if images:
            self.observation_space["image"] = Box(0, 255, (image_size, image_size, 3), np.uint8)

    def reset(self, *, seed=None, options=None):
        gymnasium.Env.reset(self, seed=seed)
        task = sim.make_task(self.split, int(self.np_random.integers(self.tasks)))
        if seed is not None:  # the scene's own: of one seed both draws would go together
            seed = int(self.np_random.integers(2 ** 31))
        return super().reset(seed=seed, options={"task": task, **(options or {})})

    def step(self, action):
        obs, reward, *ends, info = super().step(action)
        return obs, -info["distance"] if self.dense_reward else reward, *ends, info

    def _info(self):
        info = super()._info()
        poses = {"target": self.client.getBasePositionAndOrientation(self.target),
                 "distractor": self.client.getBasePositionAndOrientation(self.distractor),
                 "fork": self.client.getLinkState(self.arm, sim.FORK_LINK)[4:6]}
        for name in poses:
            info[name] = np.concatenate(poses[name])
        return {**info, "goal": np.zeros(3), "is_success": info["success"]}


gymnasium.register(f"tecnets/Push-v{sim.VERSION}", GymPushEnv)
