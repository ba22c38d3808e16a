"""Reinforcement learning with memory: a policy acts step by step, and learns from whole stretches with resets inside.

The world shows one of four signs, then three blank steps, then asks for the sign: +1 if it is named. An agent without
memory gets 0.25 on average. Acting takes `layer.step`; learning takes the same steps in one call, where `reset=` says
at which of them an episode begins. REINFORCE (Williams 1992), 16 worlds side by side, a few seconds on a CPU.
"""

import torch
from torch import Tensor, nn

import rnnfast

SIGNS, BLANK, LENGTH, WORLDS, STEPS = 4, 4, 5, 16, 40

torch.manual_seed(0)
memory = rnnfast.GRU(SIGNS + 1, 32)  # takes what it sees as token ids
policy = nn.Linear(32, SIGNS)
optimizer = torch.optim.Adam([*memory.parameters(), *policy.parameters()], lr=0.01)

clock = torch.randint(LENGTH, (WORLDS,))  # where each world is in its episode
sign = torch.randint(SIGNS, (WORLDS,))
state = torch.zeros(1, WORLDS, 32)

for update in range(60):
    seen: list[Tensor] = []
    begins: list[Tensor] = []
    actions: list[Tensor] = []
    rewards: list[Tensor] = []
    first_state = state
    with torch.no_grad():
        for _ in range(STEPS):
            begin = clock == 0
            sign = torch.where(begin, torch.randint(SIGNS, (WORLDS,)), sign)
            observed = torch.where(begin, sign, BLANK)
            state = state * ~begin[:, None]
            output, state = memory.step(observed, state)
            action = torch.distributions.Categorical(logits=policy(output)).sample()
            reward = ((clock == LENGTH - 1) & (action == sign)).float()
            for kept, value in zip((seen, begins, actions, rewards), (observed, begin, action, reward), strict=True):
                kept.append(value)
            clock = (clock + 1) % LENGTH

    output = memory(torch.stack(seen), first_state, reset=torch.stack(begins))[0]
    chosen = torch.distributions.Categorical(logits=policy(output)).log_prob(torch.stack(actions))
    gained = torch.stack(rewards)
    answers = gained.sum() / (STEPS * WORLDS / LENGTH)
    loss = -(chosen * (gained - answers / LENGTH)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if update % 20 == 19:
        print(f"update {update + 1}: {answers:.2f} of the answers are right")
